"""A study's report: what a browser shows of it, and what its files hold."""

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from jobs.settings import read_settings
from jobs.study.fits.estimate import Estimate
from jobs.study.question import Answer, Branch, Curve, Outcome, Plot, Setting, Study, Table, Trial
from jobs.study.questions.ablation import Ablation
from jobs.study.report.plots import CONTEXT, draw, label_of, left_out, shown
from jobs.study.report.rows import costs, rows_of
from jobs.study.report.write import write_report
from tests.jobs.study.synthetic import came_to, run
from workers.common.errors import StorageError

CHROMIUM = shutil.which("chromium")
NASTY = '<script>alert("x")</script> | a\x1b[2J & [b](c) `d` $\\frac{'
AXES = {"variant": {"base": {}, NASTY: {"optim.ns_steps": 6}}}
STUDY = Study(name="s <b>", axes=AXES, seeds=(0, 1, 2), question=Ablation())


def losses(trial) -> float | None:
    return None if trial.name.endswith("base") and trial.seed == 1 else 2.0 + trial.seed + 0.1 * len(trial.settings)


def outcomes() -> dict[str, Outcome]:
    return run(STUDY, losses)


def everything() -> Answer:
    """Return an answer with all that one may hold, the values that nobody wants among them."""
    curves = [
        Curve(label=NASTY, x=[1, 10, 100], y=[2.0, 1.5, 1.2], low=[1.9, math.nan, 1.1], high=[2.1, 1.6, math.inf]),
        Curve(label="_line", x=[1, 10, 100], y=[2.0, math.nan, 1.0], low=[1, 1, 0.9], high=[3, 3, 1.1], kind="line"),
        Curve(label="paper", x=[1, 100], y=[2.5, 1.5], kind="line", context=True),
        Curve(label="below 0", x=[-1, 0, 3], y=[1, 1, -1], kind="points"),
        Curve(label="empty", x=[], y=[]),
    ]
    return Answer(
        headline=f"Within the noise: {NASTY}",
        facts={"nan": math.nan, "estimate": Estimate(1.0, 0.5, math.inf), "tuple": (1, 2)},
        tables=[
            Table(
                title=NASTY,
                columns=["a|b", NASTY],
                rows=[[math.nan, None], [math.inf, Estimate(0.123456, 0.11, 0.14)], [1e19, True]],
                note=NASTY,
            )
        ],
        plots=[
            Plot(name="../a b", title=NASTY, x="tokens", y="$loss", curves=curves, log_x=True, log_y=True, marks=[1.5]),
            Plot(name="plain", title="Plain", x="x", y="y", curves=curves[:1]),
        ],
        notes=[NASTY, "second"],
        settings={"optim.lr": Setting(value=0.016, low=0.0081234, high=0.03, why=NASTY)},
    )


def links() -> dict[str, str]:
    names = [trial.name for trial in Ablation().trials(STUDY, {})]
    return {names[0]: "http://127.0.0.1:5000/#/runs/abc?a=1&b=2", names[1]: "javascript:alert(1)"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(STUDY, outcomes(), everything(), folder, links(), "run-1")
    return folder


class Reader(HTMLParser):
    """Takes a page apart: every tag that opens closes, in order."""

    EMPTY = frozenset({"meta", "source", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.texts, self.targets = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.targets += [value for key, value in attributes if key in ("src", "href", "srcset")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.texts.append(data.strip())


def read(folder) -> Reader:
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    reader.close()
    assert not reader.open
    return reader


def test_the_page_begins_with_the_headline_and_shows_every_text_as_it_is(folder):
    reader = read(folder)
    shown = NASTY.replace("\x1b", "\\x1b")
    assert reader.texts[0] == "s <b>" and reader.texts[1] == f"Within the noise: {shown}"
    assert "script" not in reader.tags and "b" not in reader.tags and "\x1b" not in (folder / "report.html").read_text()
    assert reader.texts.count(shown) >= 6
    for told in ("nan", "inf", "-", "0.123 (0.110 to 0.140)", "1.000e+19", "0.016", "0.00812 to 0.03"):
        assert told in reader.texts, told


def test_nothing_is_fetched_and_only_the_web_is_linked_to(folder):
    outside = [target for target in read(folder).targets if not target.startswith("data:image/png;base64,")]
    assert outside == ["http://127.0.0.1:5000/#/runs/abc?a=1&b=2"]
    assert "javascript:alert(1)" in read(folder).texts


def test_every_trial_is_a_row_and_those_that_wait_are_too(tmp_path):
    known = outcomes()
    done = {name: known[name] for name in list(known)[:4]}
    write_report(STUDY, done, everything(), tmp_path, {})
    texts = read(tmp_path).texts
    for trial in Ablation().trials(STUDY, {}):
        assert trial.name.replace("\x1b", "\\x1b") in texts
    assert texts[1].startswith("Not finished, 2 of 6 trials to go. Within the noise: ")
    assert texts.count("not done") == 2 + 1 and texts.count("the loss is not finite") == 1
    assert f"run-of-{next(iter(done))}".replace("\x1b", "\\x1b") in texts, "without a link the run's id"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_all_and_asks_nobody(folder, scheme):
    from playwright.sync_api import sync_playwright

    asked, told = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: told.append(message.text))
        page.on("dialog", lambda dialog: told.append(dialog.message))
        page.goto((folder / "report.html").as_uri())
        heading = page.locator("h1")
        assert heading.is_visible() and heading.inner_text().startswith("Within the noise: <script>")
        assert heading.bounding_box()["y"] < 100, "it is the first line"
        images = page.locator("img")
        assert images.count() == 2
        for number in range(2):
            image = images.nth(number)
            assert image.is_visible() and image.evaluate("image => image.naturalWidth") > 500
            dark = "dark" in image.evaluate("image => image.currentSrc === image.src ? 'light' : 'dark'")
            assert dark == (scheme == "dark")
        rows = page.locator("section", has_text="Trials").last.locator("tbody tr")
        assert rows.count() == 6 and all(rows.nth(number).is_visible() for number in range(6))
        assert all(rows.nth(number).bounding_box()["height"] < 40 for number in range(6)), "a trial is a line"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(22, 24, 29)" if scheme == "dark" else "rgb(255, 255, 255)")
        browser.close()
    assert [url for url in asked if not url.startswith("data:")] == [(folder / "report.html").as_uri()] and not told


def test_the_same_study_gives_the_same_bytes(folder, tmp_path):
    again = dict(sorted(outcomes().items(), reverse=True))
    files = write_report(STUDY, again, everything(), tmp_path, links(), "run-1")
    assert files[0].name == "report.html"
    assert sorted(file.name for file in files) == sorted(file.name for file in folder.iterdir())
    for file in files:
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


def test_plots_become_files_within_the_folder_whatever_they_are_called(folder):
    names = {file.name for file in folder.iterdir()}
    assert names == {"report.html", "report.md", "trials.csv", "answer.json", "settings.yaml", "a-b.png", "plain.png"}
    for name in ("a-b.png", "plain.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG" and picture.width > 800


def test_what_an_axis_cannot_show_is_counted_and_told(folder):
    plot = everything().plots[0]
    assert left_out(plot) == 1 + 3
    assert list(shown(plot, plot.curves[0])) == [(1, 2.0, 1.9, 2.1), (10, 1.5, None, 1.6), (100, 1.2, 1.1, None)]
    assert any("4 point(s) are not shown" in text for text in read(folder).texts)


def test_curves_of_others_say_so_and_intervals_are_drawn(tmp_path):
    assert label_of(everything().plots[0].curves[2]) == f"paper ({CONTEXT})"
    known = {"x": [1, 2, 3], "y": [1.0, 2.0, 3.0]}
    interval = {"low": [0.5, 1.5, 2.5], "high": [1.5, 2.5, 3.5]}
    pictures = set()
    for kind in ("line", "points", "both"):
        for curve in (known, {**known, **interval}, {**known, "context": True}):
            plot = Plot(name="p", title="t", x="x", y="y", curves=[Curve(label="l", kind=kind, **curve)])
            draw(plot, tmp_path / "p.png")
            pictures.add((tmp_path / "p.png").read_bytes())
    assert len(pictures) == 9


def test_the_csv_gives_every_number_back(folder):
    with (folder / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    known = outcomes()
    assert [row["trial"] for row in rows] == [trial.name for trial in Ablation().trials(STUDY, {})]
    for row in rows:
        one = known[row["trial"]]
        assert row["val_loss"] == ("" if one.val_loss is None else repr(one.val_loss))
        assert (row["axis.variant"], row["axis.seed"], row["status"]) == (
            *map(str, one.coordinates.values()),
            one.status,
        )
        assert float(row["flops"]) == one.flops and row["run_id"] == one.run_id
    assert json.loads(rows[1]["settings"]) == {"optim.ns_steps": 6}


def test_the_json_has_all_of_it_and_no_nan(folder):
    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads((folder / "answer.json").read_text(), parse_constant=refuse)
    assert found["answer"]["facts"] == {
        "nan": None,
        "estimate": {"value": 1.0, "low": 0.5, "high": None},
        "tuple": [1, 2],
    }
    assert found["study"]["question"]["name"] == "ablation" and found["study"]["axes"] == AXES
    assert len(found["trials"]) == 6 and found["trials"][0]["outcome"]["val_loss"] == 2.0
    assert "losses" not in found["trials"][0]["outcome"]


def test_the_markdown_is_a_page_of_tables(folder):
    text = (folder / "report.md").read_text()
    assert text.startswith("# Within the noise: \\<script>") and "![Plain](plain.png)" in text
    assert "127.0.0.1" not in text and "\x1b" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_settings_of_an_earlier_answer_do_not_stay(tmp_path):
    write_report(STUDY, outcomes(), everything(), tmp_path, {}, "run-1")
    assert read_settings(str(tmp_path / "settings.yaml")).settings == {"optim.lr": 0.016}
    write_report(STUDY, outcomes(), Answer(headline="h", facts={}), tmp_path, {}, "run-1")
    assert not (tmp_path / "settings.yaml").exists()


class Branching:
    """A long run and two branches of it, one of which branches again from nothing that is known."""

    name = "ablation"

    def trials(self, study, done):
        return [
            Trial(name="long", settings={}, coordinates={}),
            Trial(name="half", settings={}, coordinates={}, branch=Branch(trial="long", step=50)),
            Trial(name="lost", settings={}, coordinates={}, branch=Branch(trial="gone", step=90)),
        ]


def test_what_a_branch_has_from_its_parent_is_counted_once():
    study = Study(name="s", question=Branching())  # type: ignore[arg-type]
    done = {name: came_to(trial, 2.0) for trial in Branching().trials(study, {}) for name in [trial.name]}
    rows = rows_of(study, done, {})
    assert [row.share for row in rows] == pytest.approx([1.0, 0.5, 0.1])
    found = dict(costs(rows).rows)
    assert found["tokens"] == pytest.approx(1.6 * 100_000) and found["FLOPs of the models"] == pytest.approx(1.6 * 6e9)
    assert found["hours in steps"] == pytest.approx(3 * 12.5 / 3600)


def test_a_trial_that_is_not_asked_for_any_more_is_told_and_counted():
    old = came_to(Trial(name="old", settings={}, coordinates={"variant": "gone"}), 3.0)
    rows = rows_of(STUDY, {"old": old}, {})
    assert rows[-1].trial.name == "old" and len(rows) == 7
    assert dict(costs(rows).rows)["FLOPs of the models"] == 6e9


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the report cannot be written"):
        write_report(STUDY, outcomes(), everything(), tmp_path / "file" / "in", {})
