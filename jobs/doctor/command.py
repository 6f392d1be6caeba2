"""`raymuon doctor`: what the probes have found, as a table or as JSON, and the exit code that it comes to."""

from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from rich.text import Text

from jobs.doctor.examine import Scope, examine
from jobs.doctor.findings import Finding, exit_code
from jobs.load import load
from jobs.screen import Screen
from jobs.table import print_table
from jobs.tell import tell
from orchestrator.config import RunConfig, absolute
from orchestrator.stop import StopSignal
from workers.common.errors import Interrupted
from workers.common.storage import storage_errors

COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


def doctor(
    config: str | None,
    overrides: list[str],
    address: str | None,
    storage: str,
    calibration: Path | None,
    as_json: bool,
) -> int:
    """Examine, say what was found, and return the exit code: 0 without a failure, 3 for the cluster's, 5 for others'.

    Args:
        config: of the run; None, or already the first override, for the cluster alone.
        overrides: of the config; without one, those that name a place have it checked.
        address: of a Ray cluster; None starts a local one.
        storage: folder to check in the place of checkpoint.url; empty for that.
        calibration: file for what was measured.
        as_json: as one JSON object on the last line of stdout.

    Raises:
        ConfigError: the config is wrong.
        ClusterError: no cluster answers.
        Interrupted: a person has ended it.
        StorageError: the calibration cannot be written.
    """
    run_config, scope = asked_for(config, overrides, storage, calibration is not None)
    stop = StopSignal()
    stop.listen(outlive_terminal=False)  # What it finds goes to the terminal alone.
    console = Screen(stderr=True)

    def phase(text: str) -> None:
        console.print(f"{text} ...", style="dim")

    try:
        examined = examine(run_config, scope, address, stop, phase)
    except Interrupted:
        raise Interrupted("interrupted; nothing is left behind") from None
    code = exit_code(examined.findings)
    show(examined.findings, Screen(stderr=as_json))
    if calibration is not None and examined.calibration:
        with storage_errors(str(calibration)):
            calibration.write_text(examined.calibration)
    if as_json:
        told = {"exit_code": code, "findings": [asdict(finding) for finding in examined.findings]}
        tell(told)
    return code


def asked_for(config: str | None, overrides: list[str], storage: str, calibrate: bool) -> tuple[RunConfig, Scope]:
    """Return the config, with absolute paths, and what is looked at."""
    given = config is not None and "=" not in config
    changes = overrides if given or config is None else [config, *overrides]
    run_config = load(config if given and config else "demo", changes)
    if storage:
        run_config = replace(run_config, checkpoint=replace(run_config.checkpoint, url=storage))

    def named(key: str) -> bool:
        return given or any(change.startswith(key) for change in changes)

    return absolute(run_config), Scope(
        storage=bool(storage) or named("checkpoint.url="),
        data=named("data.prepared_url="),
        tracking=named("tracking."),
        all_slots=not given and not named("scaling.max_workers="),
        calibrate=calibrate,
    )


def show(findings: list[Finding], console: Screen) -> None:
    """Print a table, grouped by check, and a line that sums it up."""
    rows = []
    for check, group in groupby(findings, key=lambda finding: finding.check):
        for number, finding in enumerate(group):
            seen = Text(finding.seen)
            if finding.mend:
                seen.append(f"\n-> {finding.mend}", style="dim")
            status = Text(finding.status, style=COLOURS[finding.status])
            rows.append(("" if number else check, status, finding.node, seen))
    print_table(console, ("check", "", "node", "seen, and what to do"), rows, wrap=True)
    failures, warnings = (sum(one.status == status for one in findings) for status in ("failure", "warning"))
    colour = COLOURS["failure" if failures else "warning" if warnings else "ok"]
    console.print(f"{failures} failure(s), {warnings} warning(s)", style=colour)
