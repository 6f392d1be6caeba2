"""A study's report, written into a folder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.settings import conditions_of, settings_yaml
from jobs.study.question import Answer, Outcome, Plot, Study
from jobs.study.report.files import answer_json, markdown, trials_csv
from jobs.study.report.page import page
from jobs.study.report.plots import draw
from jobs.study.report.rows import costs, rows_of, tuned
from orchestrator.config import RunConfig
from workers.common.errors import StorageError

PAGE, TRIALS, ANSWER, MARKDOWN, SETTINGS = "report.html", "trials.csv", "answer.json", "report.md", "settings.yaml"


def write_report(
    study: Study,
    outcomes: Mapping[str, Outcome],
    answer: Answer,
    folder: Path,
    links: Mapping[str, str],
    run_id: str = "",
    config: RunConfig | None = None,
) -> list[Path]:
    """Write the report of a study, the same bytes for the same study, and return its files, the page first.

    Args:
        study: what was asked.
        outcomes: of the trials that are done, by name.
        answer: what they come to.
        folder: for the files; it is made, and what stands in it under their names is written anew.
        links: trial to the address of its run; of a run that no page shows, its id.
        run_id: of the study's own run, which the settings name as their source.
        config: of its trials: at which width the settings were found.

    Raises:
        StorageError: they cannot be written.
    """
    rows = rows_of(study, outcomes, links)
    counted = [tuned(rows), costs(rows)]
    pictures = _names(answer.plots)
    texts = {
        PAGE: page(study, answer, rows, counted),
        MARKDOWN: markdown(study, answer, rows, counted, pictures),
        TRIALS: trials_csv(rows),
        ANSWER: answer_json(study, answer, rows),
    }
    if answer.settings:
        conditions = conditions_of(config, [row.trial.settings for row in rows]) if config else {}
        texts[SETTINGS] = settings_yaml(study, answer, run_id, conditions)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for plot in answer.plots:
            draw(plot, folder / pictures[plot.name])
        if not answer.settings:  # Those of an earlier answer would be used.
            (folder / SETTINGS).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: the report cannot be written ({error})") from error
    return [folder / name for name in (*texts, *pictures.values())]


def _names(plots: Sequence[Plot]) -> dict[str, str]:
    """Return the file of each plot, by its name; plots have different names."""
    files = {plot.name: re.sub(r"[^A-Za-z0-9._-]+", "-", plot.name).lstrip(".-") + ".png" for plot in plots}
    assert len({*files.values()}) == len(plots), f"plots of one name: {[plot.name for plot in plots]}"
    return files
