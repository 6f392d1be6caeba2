"""The documentation names every command and option that there is, and no link in it leads nowhere."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from jobs.cli import app
from jobs.load import CONFIGS, load
from jobs.study.file import load_study
from workers.data.enough import check_corpus
from workers.data.prepare import prepare

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ROOT / "docs" / "commands"
TEXTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "infra/README.md")),
]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


def blocks(language: str, text: str = TUTORIAL) -> list[str]:
    """Return the fenced blocks of a page in a language; "" for those with output."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def printed_commands(text: str) -> list[list[str]]:
    """Return the raymuon commands that a page has its reader type; what has brackets around options is none."""
    found = []
    for language in ("sh", "", "console"):
        lines = "\n".join(blocks(language, text)).replace("\\\n", "").splitlines()
        typed = [line.removeprefix("$ ") for line in lines if language == "sh" or line.startswith("$ ")]
        parts = (
            re.sub(r"^\S*/bin/", "", part) for line in typed for part in re.split(r" (?:&&|\||2?>|<|&)(?: |$)", line)
        )
        found += [
            shlex.split(one, comments=True)[1:] for one in parts if one.startswith("raymuon ") and " [" not in one
        ]
    return found


def check_command(typed: list[str]) -> dict:
    """Have the command line take a command, options and all, and return what it makes of it."""
    name, *rest = typed
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    if sub := getattr(command, "commands", None):
        command, rest = sub[rest[0]], rest[1:]
    return command.make_context(name, list(rest), resilient_parsing=False).params


def pages() -> dict[str, list[tuple[str, set[str]]]]:
    """Return the page of each command, with the commands that it documents and their options."""
    found = {}
    for page, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        named = {f"{page} {name}": one for name, one in below.items()} if below else {page: command}
        found[page] = [(name, options(one)) for name, one in named.items()]
    return found


def options(command) -> set[str]:
    """Return the options of a command in their long form; all have --help."""
    return {
        option for param in command.params for option in (*param.opts, *param.secondary_opts) if option.startswith("--")
    } - {"--help"}


def anchors(text: str) -> set[str]:
    """Return what GitHub makes of a page's headings: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken(page: Path) -> Iterator[str]:
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target.read_text()):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", pages())
def test_every_command_has_a_page_that_names_its_options(page):
    text = (COMMANDS / f"{page}.md").read_text()
    words = set(re.findall(r"--[a-z][a-z0-9-]*", text))
    for name, expected in pages()[page]:
        assert f"raymuon {name}" in text, f"{name} is not shown"
        assert not expected - words, f"{name}: not named: {sorted(expected - words)}"


@pytest.mark.parametrize("page", pages())
def test_a_page_names_no_option_that_its_command_lacks(page):
    """Other programs' options and other commands' may stand in code; the table of options is the command's own."""
    text = (COMMANDS / f"{page}.md").read_text()
    tabled = {
        option
        for row in re.findall(r"^\| (`--.*?) \|", text, re.MULTILINE)
        for option in re.findall(r"--[a-z0-9-]+", row)
    }
    known = set().union(*(expected for _, expected in pages()[page]))
    assert not tabled - known, f"not an option any more: {sorted(tabled - known)}"


def test_every_page_belongs_to_a_command_and_is_in_the_contents():
    contents = (ROOT / "docs" / "README.md").read_text()
    for page in COMMANDS.glob("*.md"):
        assert page.stem in pages(), f"{page.name}: there is no such command"
        assert f"commands/{page.name}" in contents


def test_make_help_lists_every_verb():
    verbs = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()  # type: ignore[index]
    told = subprocess.run(["make", "--silent", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[1] for line in told.splitlines()) == sorted(verbs)


def test_every_built_in_config_is_listed():
    text = (COMMANDS / "config.md").read_text()
    assert [name for name in (path.stem for path in CONFIGS.glob("*.yaml")) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not list(broken(page))


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One, `two` and three\n[here](#one-two-and-three) [file](b.md) [part](a.md#four)\n"
    )
    assert list(broken(tmp_path / "a.md")) == ["b.md: no such file", "a.md#four: no such heading"]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_taken_as_they_are_printed(page):
    for typed in printed_commands(page.read_text()):
        check_command(typed)


def test_the_tutorials_changes_of_the_config_are_taken():
    """But for those that are meant to be wrong."""
    for typed in printed_commands(TUTORIAL):
        changes = check_command(typed).get("overrides") or []
        load("demo", [one for one in changes if one != "train.stepz=9" and "=fast" not in one])


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_are_sound_as_they_are_printed(page, tmp_path):
    text = page.read_text()
    shown = re.findall(r"^\$ cat \S+\.yaml\n(.*?)^\$ ", "".join(blocks("console", text)), re.DOTALL | re.MULTILINE)
    for config in [*blocks("yaml", text), *shown]:
        (tmp_path / "config.yaml").write_text(config)
        if re.search(r"^question:", config, re.MULTILINE):
            study = load_study(str(tmp_path / "config.yaml")).study
            study.question.check(study)
        else:
            load(str(tmp_path / "config.yaml"), [])


def test_the_tutorials_own_config_finds_its_text_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (making,) = (block for block in blocks("sh") if "mkdir texts" in block)
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euc", making], check=True, cwd=tmp_path, env=environment)
    (config,) = blocks("yaml")
    Path("my.yaml").write_text(config)
    loaded = load("my.yaml", [])
    (corpus,) = prepare(loaded.data)
    assert not check_corpus(corpus, loaded.train.seq_len, loaded.train.global_batch)


def test_the_tutorial_is_followed_in_any_folder():
    typed = "\n".join(blocks("sh") + blocks("yaml"))
    assert "docs/" not in typed and "make " not in typed and ".venv" not in typed
    assert "workflowType=machine_learning" in TUTORIAL
