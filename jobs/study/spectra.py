"""The spectra of checkpoints, measured by tasks, and what they come to by group."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import get_args, get_type_hints

from jobs.import_ import import_model
from jobs.trained import Trained, undeleted
from optim.config import OptimConfig
from orchestrator.group.cluster import connected, is_local
from orchestrator.log.run_log import RunLog
from orchestrator.stop import StopSignal
from workers.common.errors import ConfigError
from workers.common.storage import Store
from workers.models.language_model import MATRICES
from workers.spectra import Piece, Saved, Spectrum, Stack, spectra_of, stacks_of

DIFFERENCES_TOLD = 3


@dataclass(frozen=True)
class Subject:
    """One of what is compared: checkpoints of a run, oldest first, or a model alone."""

    label: str
    checkpoints: tuple[Trained, ...]


@dataclass(frozen=True)
class Mean:
    """What the spectra of a group's matrices come to."""

    entropy: float | None
    """Mean over the matrices, of which each counts once; None where there is none that is finite."""
    matrices: int
    left_out: int
    """Matrices that are not finite."""


@dataclass(frozen=True)
class Measured:
    """The spectra of one checkpoint, in the model's order."""

    label: str
    """Of the subject."""
    step: int
    tokens: int
    spectra: tuple[Spectrum, ...]

    @cached_property
    def means(self) -> dict[str, Mean]:
        """By group, in the order of MATRICES."""
        return means_of(self.spectra, lambda spectrum: spectrum.kind)

    @cached_property
    def by_layer(self) -> dict[tuple[str, int], Mean]:
        """By group and layer; what is in no layer is left out."""
        layered = [spectrum for spectrum in self.spectra if spectrum.layer is not None]
        return means_of(layered, lambda spectrum: (spectrum.kind, spectrum.layer))


def means_of(spectra: Sequence[Spectrum], key: Callable) -> dict:
    """Return the mean of each group of spectra, groups in the order in which MATRICES has their kinds."""
    groups = defaultdict(list)
    for spectrum in sorted(spectra, key=lambda spectrum: MATRICES.index(spectrum.kind)):
        groups[key(spectrum)].append(spectrum.entropy)
    return {name: _mean(entropies) for name, entropies in groups.items()}


def _mean(entropies: list[float | None]) -> Mean:
    finite = [entropy for entropy in entropies if entropy is not None]
    return Mean(fmean(finite) if finite else None, len(finite), len(entropies) - len(finite))


def label_all(found: Sequence[Sequence[Trained]]) -> list[Subject]:
    """Give each of what is compared a name of its own: the run's, and as much more as tells it from the others.

    Raises:
        ConfigError: one is there twice.
    """
    last = [checkpoints[-1] for checkpoints in found]
    names = [(one.found.name if one.found else "") or one.run_id[:8] for one in last]
    ids = [f"{name} ({one.run_id[:8]})" for name, one in zip(names, last, strict=True)]
    for labels in (names, _at_step(names, last), ids, _at_step(ids, last)):
        if len(set(labels)) == len(labels):
            return [Subject(label, tuple(one)) for label, one in zip(labels, found, strict=True)]
    twice = next(one.where for one, label in zip(last, labels, strict=True) if labels.count(label) > 1)
    raise ConfigError(f"{twice} is named twice; name each run or checkpoint once")


def _at_step(names: list[str], last: list[Trained]) -> list[str]:
    return [f"{name}@{one.step}" for name, one in zip(names, last, strict=True)]


def groups_of(asked: Collection[str]) -> tuple[str, ...]:
    """Return the groups that are asked for, all of them where none is.

    Raises:
        ConfigError: there is no such group.
    """
    if unknown := [group for group in asked if group not in MATRICES]:
        raise ConfigError(f"--group {unknown[0]}: no such group of matrices; there are {', '.join(MATRICES)}")
    return tuple(group for group in MATRICES if not asked or group in asked)


def split_of(asked: str) -> str:
    """Return what a person asks for.

    Raises:
        ConfigError: there is no such way to split.
    """
    ways = get_args(get_type_hints(OptimConfig)["split"])
    if asked not in ways:
        raise ConfigError(f"--split must be {', '.join(ways[:-1])} or {ways[-1]}, not {asked!r}")
    return asked


def common_stacks(subjects: Sequence[Subject], groups: Collection[str], split: str) -> list[Stack]:
    """Return the matrices of the groups, which all subjects have alike.

    Entropy is relative to the logarithm of a matrix's smaller side, and a mean to how many matrices are in it: of
    models whose matrices differ, a difference would be no difference of their training.

    Raises:
        ConfigError: they have not, or there are none.
    """
    first, *others = ((subject, stacks_of(subject.checkpoints[-1].model_config, groups, split)) for subject in subjects)
    for subject, stacks in others:
        if differences := list(_differences(first[1], stacks)):
            more = f", and {len(differences) - DIFFERENCES_TOLD} more" if len(differences) > DIFFERENCES_TOLD else ""
            raise ConfigError(
                f"{first[0].label} and {subject.label} have other matrices, so their spectra cannot be compared: "
                f"{'; '.join(differences[:DIFFERENCES_TOLD])}{more}; look at each alone, or with --group at what both "
                "have alike"
            )
    missing = [group for group in groups if group not in {stack.kind for stack in first[1]}]
    if missing and (len(groups) < len(MATRICES) or len(missing) == len(groups)):
        raise ConfigError(f"{first[0].label}: this model has no matrices of the group {missing[0]}")
    return first[1]


def _differences(first: Sequence[Stack], second: Sequence[Stack]) -> Iterator[str]:
    shapes, others = ({stack.name: _shape(stack) for stack in stacks} for stacks in (first, second))
    for name in dict.fromkeys([*shapes, *others]):
        if shapes.get(name) != others.get(name):
            yield f"{name} is {shapes.get(name, 'not there')} and {others.get(name, 'not there')}"


def _shape(stack: Stack) -> str:
    whole = "x".join(str(size) for size in (stack.count, stack.rows, stack.columns))
    return f"{whole} in parts of {', '.join(map(str, stack.parts))} rows" if stack.parts else whole


def measure(
    subjects: Sequence[Subject],
    stacks: Sequence[Stack],
    address: str | None,
    stop: StopSignal,
    told: Callable[[int, int], object],
) -> list[list[Measured]]:
    """Measure all checkpoints by tasks on the cluster at `address`, or on a local Ray; each GPU has a task at a time.

    Args:
        subjects: what is measured.
        stacks: the matrices of all.
        address: of a Ray cluster; None starts a local one, unless RAY_ADDRESS is set.
        stop: tells when a person wants it to end.
        told: gets how many matrices are done, and how many there are.

    Returns:
        The checkpoints of each subject; all singular values of the last one alone.

    Raises:
        ConfigError: a folder of this machine is named, and the tasks are elsewhere.
        StorageError: a checkpoint is damaged, or storage does not answer.
        ClusterError: the cluster cannot be reached, or loses too many tasks.
        Interrupted: a person has ended it.
    """
    from orchestrator.tasks import by_tasks, free_gpus

    checkpoints = [(subject, one) for subject in subjects for one in subject.checkpoints]
    for _, one in checkpoints:
        if one.log is None and not is_local(address):
            raise ConfigError(f"{one.where}: a folder is read on this machine; import it first: raymuon import FOLDER")
    last = {id(subject.checkpoints[-1]) for subject in subjects}
    pieces = [piece for stack in stacks for piece in stack.pieces()]
    work = [(number, piece) for number in range(len(checkpoints)) for piece in pieces]
    total = len(checkpoints) * sum(stack.count * max(1, len(stack.parts)) for stack in stacks)
    found: dict[tuple[int, Piece], list[Spectrum]] = {}
    done = 0
    read = ((one.log, one.commit) for _, one in checkpoints)
    with undeleted(*read), connected(address, stop), tempfile.TemporaryDirectory(prefix="raymuon-") as folder:
        saved = [_saved(one, f"{folder}/{number}") for number, (_, one) in enumerate(checkpoints)]
        gpus = min(1, free_gpus())
        for (number, piece), spectra in by_tasks(spectra_of, saved, work, stop, "study", gpus):
            keep = id(checkpoints[number][1]) in last
            found[number, piece] = spectra if keep else [replace(spectrum, values=None) for spectrum in spectra]
            done += len(spectra)
            told(done, total)
    made = iter(
        Measured(
            subject.label,
            one.step,
            one.manifest.counters["tokens"],
            tuple(spectrum for piece in pieces for spectrum in found[number, piece]),
        )
        for number, (subject, one) in enumerate(checkpoints)
    )
    return [[next(made) for _ in subject.checkpoints] for subject in subjects]


def _saved(trained: Trained, folder: str) -> Saved:
    """Return what tasks read a checkpoint by; that of a Hugging Face folder is made in `folder`."""
    log = trained.log or RunLog(Store(import_model(trained.where, folder)))
    commit = trained.commit or log.commit_of()
    return Saved(log.store.url, log.store.s3_endpoint, commit.manifest, commit.sha256)
