"""Options that are refused before anything begins."""

import pytest
from typer import TyperException
from typer.testing import CliRunner

from jobs.cli import app
from jobs.cli.options import writable


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", "variants", "--table", "{folder}"], "{folder} cannot be written (it is a folder)"),
        (["bench", "curves", "--picture", "{file}/curves.png"], "{file}/curves.png cannot be written"),
        (["doctor", "--calibration", "{file}/x/calibration.json"], "{file}/x/calibration.json cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, arguments, told):
    (tmp_path / "file").write_text("in the way")
    places = {"folder": str(tmp_path), "file": str(tmp_path / "file")}
    found = CliRunner().invoke(app, [part.format(**places) for part in arguments], standalone_mode=False).exception
    assert isinstance(found, TyperException) and found.exit_code == 2
    assert told.format(**places) in found.format_message()


def test_the_folder_of_a_file_to_be_written_is_made(tmp_path):
    assert writable(tmp_path / "new" / "table.md") == tmp_path / "new" / "table.md"
    assert (tmp_path / "new").is_dir() and not (tmp_path / "new" / "table.md").exists()
