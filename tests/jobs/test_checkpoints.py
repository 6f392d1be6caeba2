"""What the command line shows of checkpoints, damaged ones too."""

from typer.testing import CliRunner

from jobs.cli import app
from orchestrator.log.run_log import RunLog
from tests.jobs.test_export import trained
from workers.common.storage import Store


def test_a_list_shows_a_damaged_manifest(tmp_path):
    trained(tmp_path / "run", "llama", steps=(10, 20))
    path = tmp_path / "run" / RunLog(Store(str(tmp_path / "run"))).find(10).manifest
    path.write_bytes(path.read_bytes()[:-1])
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["checkpoints", "ls", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    first, second = (line for line in done.output.splitlines() if "run" in line and "step" not in line)
    assert path.name in first and "damaged" in first and "12,345" not in first
    assert "12,345" in second and "damaged" not in second
