"""Everything that can be refused is found out before the MLflow run is made, most of it before Ray is started.

So bad input is told within seconds and leaves nothing behind. What is slow (MLflow's import and its database) runs
beside Ray's start and the workers' own imports.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from orchestrator.config import RunConfig, database, database_files
from orchestrator.identity import check_identity, identity
from orchestrator.log.lease import await_free
from orchestrator.log.run_log import RunLog
from orchestrator.origin import beginning, other_tokens
from orchestrator.reach import reach_tracking
from orchestrator.resumption import check_steps, new_beside
from orchestrator.stop import StopSignal
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.data.corpus import Corpus, load
from workers.data.enough import check_corpora
from workers.data.prepare import prepare
from workers.task import Origin

if TYPE_CHECKING:
    from orchestrator.record.tracking import Tracking

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a run is made of, besides its config."""

    corpora: tuple[Corpus, ...]
    """Of each source."""
    warning: str
    """That the store does not honour conditional creates, on which fencing rests; empty where it does."""


def check_inputs(config: RunConfig, corpora: tuple[Corpus, ...] | None = None) -> Inputs:
    """Check that tracking and storage can be reached and that there is enough data.

    Args:
        config: of the run.
        corpora: to train on; None prepares what the config names.

    Raises:
        ConfigError: the corpus is missing, empty or too small.
        StorageError: a server does not answer, or storage cannot be written.
    """
    reach_tracking(config.tracking.uri, config.tracking.experiment)
    _make_folder(config.tracking.uri)
    url = config.checkpoint.url
    endpoint = config.storage.s3_endpoint
    fences = Store(url, endpoint).probe()
    warning = f"{url} does not honour conditional creates: only the lease keeps two drivers apart"
    corpora = corpora or prepare(config.data, database_files(config.tracking.uri), endpoint)
    check_data(config, corpora)
    return Inputs(corpora, "" if fences else warning)


def check_data(config: RunConfig, corpora: tuple[Corpus, ...]) -> None:
    """Refuse sources that a run cannot be trained on.

    Raises:
        ConfigError: with everything that is wrong with them.
    """
    drawn, most_long = config.recipe.drawn(config.data), config.data.max_long_conversations
    check_corpora(corpora, config.train.seq_len, drawn, config.model.vocab_size, most_long)


class Preflight:
    """The checks of a run; those that take long go on beside Ray's start and the workers' imports.

    Made, it has refused what can be refused before Ray starts.

    Args:
        config: of the run, with absolute paths.
        resume: `never`, `auto`, or a run's id or name.
        stop: tells when a person wants it to end.
        warn: told of what does not end the run.
        corpora: to train on; None prepares what the config names.
        take_over: do not wait until no other driver leads the run.
        known: the checkpoint that `train.init` names, where somebody has it already.
        looked: raises where the run does not fit.

    Raises:
        RaymuonError: something is refused.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: str,
        stop: StopSignal,
        warn: Callable[[str], object],
        corpora: tuple[Corpus, ...] | None = None,
        take_over: bool = False,
        known: Origin | None = None,
        looked: Future[None] | None = None,
    ) -> None:
        self.config, self.stop, self.warn, self._looked = config, stop, warn, looked
        self.inputs = self._await(in_background(lambda: check_inputs(config, corpora), may_be_torn=True))
        if self.inputs.warning:
            warn(self.inputs.warning)
        self._found = in_background(lambda: find_run(config, self.inputs.corpora, resume, known), may_be_torn=False)
        if resume != "never" and self.found.notice:  # Told, or refused, before Ray starts.
            warn(self.found.notice)
        self._free = in_background(lambda: take_over or await_free_run(config, self._found.result()), may_be_torn=True)

    def check(self) -> None:
        """Raise where a person wants an end, or where something has been refused by now."""
        self.stop.check()
        for answer in (self._found, self._looked, self._free):
            if answer is not None and answer.done():
                answer.result()  # A refusal does not wait for slots or workers.

    def finish(self) -> None:
        """Wait for what is still being checked."""
        self._await(self._free)
        if self._looked is not None:
            self._await(self._looked)
        if (origin := self.found.origin) and (
            told := other_tokens(origin.manifest.identity, self.inputs.corpora[0].tokenizer)
        ):
            self.warn(told)

    @property
    def found(self) -> "Found":
        """What there is of the run; waits for it."""
        return self._await(self._found)

    def _await(self, answer: Future[T]) -> T:
        """Wait in short stretches, so that a person can interrupt."""
        while not answer.done():
            self.stop.check()
            wait([answer], timeout=0.1)
        return answer.result()


@dataclass(frozen=True)
class Found:
    """The tracking store, the run to go on with, if any, and the weights to begin with, if it has none yet."""

    tracking: "Tracking"
    run_id: str | None = None
    origin: Origin | None = None
    log: RunLog | None = None
    """Of the run, as it was read."""
    notice: str = ""
    """For the person."""


def find_run(config: RunConfig, corpora: tuple[Corpus, ...], resume: str, known: Origin | None = None) -> Found:
    """Open the tracking store and find the run that `resume` means: `never`, `auto`, or a run's id or name.

    Raises:
        ConfigError: there is no such run, this config would make another run of it or leaves nothing to train, or
            `train.init` cannot be used.
        StorageError: the tracking store or the run's files cannot be read.
    """
    begin = partial(beginning, config, corpora, known)
    origin = begin() if resume == "never" else None  # Told at once: MLflow takes seconds to import.
    from orchestrator.record.tracking import Tracking

    tracking = Tracking(config.tracking)
    if resume == "never":
        return Found(tracking, origin=origin)
    run_id = tracking.unfinished(config.run.name) if resume == "auto" else tracking.find(resume)
    if run_id is None:
        finished = tracking.newest_finished(config.run.name)
        notice = new_beside(finished, config.run.name) if finished else ""
        return Found(tracking, origin=begin(), notice=notice)
    log = RunLog(run_store(config, run_id))
    if log.identity is None:
        if resume == "auto":  # Its files are elsewhere: it is not ours to go on with.
            notice = (
                f"a new run begins: nothing of the unfinished one named {config.run.name}, {run_id}, is under "
                f"checkpoint.url={config.checkpoint.url}"
            )
            return Found(tracking, origin=begin(), notice=notice)
        if tracking.submitted(run_id):
            return Found(tracking, run_id, begin())
        raise ConfigError(f"--resume {resume}: nothing of run {run_id} is under checkpoint.url={config.checkpoint.url}")
    check_identity(log, identity(config, corpora))
    reached = log.reached
    notice = check_steps(run_id, reached, config.train.steps, tracking.is_finished(run_id))
    # A run with checkpoints has no more need of its origin, which may be gone by now.
    return Found(tracking, log.run_id, None if log.commits else begin(), log, notice)


def await_free_run(config: RunConfig, found: Found) -> None:
    """Wait until no other driver leads the run that was found.

    Raises:
        ClusterError: one does.
    """
    if found.run_id is not None:
        await_free(run_store(config, found.run_id))


def run_store(config: RunConfig, run_id: str) -> Store:
    """Return the folder of a run's files."""
    return Store(config.checkpoint.url, config.storage.s3_endpoint).child(run_id)


def corpora_of(urls: Mapping[str, str], s3_endpoint: str) -> tuple[Corpus, ...]:
    """Read the prepared sources of a run, by their names.

    Raises:
        StorageError: one is missing or damaged.
    """
    return tuple(load(Store(url, s3_endpoint), name) for name, url in urls.items())


def in_background(work: Callable[[], T], may_be_torn: bool) -> Future[T]:
    """Run `work` in a thread.

    Args:
        work: what to do.
        may_be_torn: the process may end in the middle of it. Otherwise its end waits for the work: MLflow, torn while
            it makes the tables of a new database, leaves one that nobody can open.
    """
    future: Future[T] = Future()

    def settle() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=settle, name="preflight", daemon=may_be_torn).start()
    return future


def _make_folder(uri: str) -> None:
    """Make the folder of a tracking database."""
    if (file := database(uri)) is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"tracking.uri={uri}: the folder cannot be made ({error})") from error
