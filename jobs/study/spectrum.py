"""`raymuon study spectrum`: singular values and SVD entropy of checkpoints and runs, as in Moonlight's Figure 4."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.screen import Screen
from jobs.study.spectra import Measured, Subject, common_stacks, groups_of, label_all, measure, split_of
from jobs.study.spectrum_files import MATRICES_CSV, VALUES_CSV, draw_layers, draw_series, draw_values, write_tables
from jobs.table import print_table
from jobs.tell import tell
from jobs.trained import Trained, open_trained, series
from orchestrator.stop import StopSignal
from workers.common.errors import ConfigError, StorageError

TELL_S = 2.0
"""Between two lines."""
PICTURES = {"entropy.png": draw_series, "layers.png": draw_layers, "singular_values.png": draw_values}
FILES = (MATRICES_CSV, VALUES_CSV, *PICTURES)


@dataclass(frozen=True)
class Request:
    """What a person asks for."""

    what: tuple[str, ...]
    """Runs, checkpoints, folders."""
    series: bool
    """All checkpoints of each."""
    groups: tuple[str, ...]
    """Empty for all."""
    split: str
    out: str
    """A folder; empty for a new one under `runs/`."""
    log: bool
    """Put what comes out into the MLflow run of each run."""
    address: str | None
    tracking_uri: str
    s3_endpoint: str


def spectrum(request: Request, stop: StopSignal, as_json: bool) -> None:
    """Measure, write, and say what it comes to.

    Raises:
        RaymuonError: with its exit code.
    """
    console = Screen(stderr=as_json)
    groups, split = groups_of(request.groups), split_of(request.split)
    with stop.abruptly():
        subjects = label_all([_opened(what, request) for what in request.what])
        stacks = common_stacks(subjects, groups, split)
        logged = _tracked(subjects) if request.log else []
    with _new_folder(request.out) as folder:
        found = measure(subjects, stacks, request.address, stop, _Progress(console).told)
        _write(folder, found)
    _print(console, found)
    for file in FILES:
        console.print(str(folder / file))
    for run in logged:
        _log(run, folder)
        console.print(f"in MLflow: {run.run_id}, {_artifacts(run)}")
    if as_json:
        tell(_summary(folder, found, logged))


def _opened(what: str, request: Request) -> list[Trained]:
    if request.series:
        return series(what, request.tracking_uri, request.s3_endpoint)
    return [open_trained(what, request.tracking_uri, request.s3_endpoint)]


@contextmanager
def _new_folder(out: str) -> Iterator[Path]:
    """Make the folder, and take it away again if what belongs into it does not come to its end.

    Raises:
        ConfigError: something is in it already.
        StorageError: it cannot be made.
    """
    folder = Path(out or f"runs/spectra/{time.strftime('%Y-%m-%d-%H%M%S')}").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--out {folder}: something is there already; name a new folder")
    except OSError as error:
        raise StorageError(f"--out {folder}: the folder cannot be made ({error})") from error
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
        raise


def _write(folder: Path, found: Sequence[Sequence[Measured]]) -> None:
    try:
        write_tables(folder, found)
        for name, draw in PICTURES.items():
            draw(folder / name, found)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error})") from error


def _tracked(subjects: Sequence[Subject]) -> list[Trained]:
    """Return the newest checkpoint of each run, all of which are in MLflow.

    Raises:
        ConfigError: one is not.
    """
    last = [subject.checkpoints[-1] for subject in subjects]
    for one in last:
        if one.tracked is None:
            raise ConfigError(f"--log: {one.where} is of no run in MLflow; leave --log out, or check --tracking-uri")
    return last


def _artifacts(run: Trained) -> str:
    return f"spectra/step-{run.step:08d}"


def _log(run: Trained, folder: Path) -> None:
    from orchestrator.config import TrackingConfig
    from orchestrator.record.tracking import Tracking

    Tracking(TrackingConfig(uri=run.tracking_uri)).attach(run.run_id, folder, _artifacts(run))


def _print(console: Screen, found: Sequence[Sequence[Measured]]) -> None:
    """Print the groups' entropies at the last checkpoints, and how the others' differ from the first's."""
    last = [one[-1] for one in found]
    first, *others = last
    head = ["group", "matrices", *(_named(one) for one in last)]
    for other in others:
        head += [f"{first.label} - {other.label}", "higher in"]
    rows = []
    for group, mean in first.means.items():
        row = [group, str(mean.matrices + mean.left_out), *(_figure(one.means[group].entropy) for one in last)]
        for other in others:
            difference, higher, pairs = compared(first, other, group)
            row += [_figure(difference, "+"), f"{higher} of {pairs}"]
        rows.append(row)
    title = "SVD entropy, mean over the matrices of a group; 0 is of rank one, 1 all singular values alike"
    print_table(console, head, rows, title=title)
    for one in (measured for checkpoints in found for measured in checkpoints):
        if left_out := sum(mean.left_out for mean in one.means.values()):
            console.print(f"{_named(one)}: {left_out} matrices are not finite and left out")


def _named(measured: Measured) -> str:
    step = f"@{measured.step}"
    return measured.label if measured.label.endswith(step) else f"{measured.label} {step}"


def _figure(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def compared(first: Measured, other: Measured, group: str) -> tuple[float | None, int, int]:
    """Return the difference of a group's means, in how many matrices the first's entropy is higher, and of how many.

    Matrices that are not finite in either are left out of the pairs.
    """
    a, b = first.means[group].entropy, other.means[group].entropy
    pairs = [
        (one.entropy, two.entropy)
        for one, two in zip(first.spectra, other.spectra, strict=True)
        if one.kind == group and one.entropy is not None and two.entropy is not None
    ]
    higher = sum(one > two for one, two in pairs)
    return (None if a is None or b is None else a - b), higher, len(pairs)


def _summary(folder: Path, found: Sequence[Sequence[Measured]], logged: Sequence[Trained]) -> dict[str, Any]:
    first, *others = (one[-1] for one in found)
    return {
        "out": str(folder),
        "files": FILES,
        "runs": [{"run": one[-1].label, "checkpoints": [_told(measured) for measured in one]} for one in found],
        "differences": [
            {"run": first.label, "from": other.label, "groups": {g: _difference(first, other, g) for g in first.means}}
            for other in others
        ],
        "logged": [run.run_id for run in logged],
    }


def _told(measured: Measured) -> dict[str, Any]:
    groups = {group: asdict(mean) for group, mean in measured.means.items()}
    layers = [{"group": g, "layer": layer, **asdict(mean)} for (g, layer), mean in measured.by_layer.items()]
    return {"step": measured.step, "tokens": measured.tokens, "groups": groups, "layers": layers}


def _difference(first: Measured, other: Measured, group: str) -> dict[str, Any]:
    return dict(zip(("entropy", "higher", "pairs"), compared(first, other, group), strict=True))


class _Progress:
    """Says how far it is."""

    def __init__(self, console: Screen) -> None:
        self.console = console
        self._first: tuple[float, int] | None = None
        """When the first matrices were done, and how many: the workers' start is no measure of what is left."""
        self._said = 0.0

    def told(self, done: int, total: int) -> None:
        """Take note of what is done."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._said = (now, done), now
        if now - self._said < TELL_S and done < total:
            return
        since, before = self._first
        left = (total - done) * (now - since) / max(1, done - before)
        self._said = now
        self.console.print(f"spectra: {done:,} of {total:,} matrices, {left:,.0f} s left", style="dim")
