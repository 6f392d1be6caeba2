"""Everything that can be refused is found out before the MLflow run is made, most of it before Ray is started.

So bad input is told within seconds and leaves nothing behind. What is slow (MLflow's import and its database) runs
beside Ray's start and the workers' own imports.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.config import RunConfig, database, database_files, flatten
from orchestrator.log.lease import await_free
from orchestrator.log.run_log import RunLog, find_commit
from orchestrator.reach import reach_tracking
from orchestrator.resumption import check_steps, new_beside
from orchestrator.stop import StopSignal
from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.config import ModelConfig
from workers.data.corpus import Corpus, load
from workers.data.enough import check_corpora
from workers.data.packing import PACKING
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
    ) -> None:
        self.config, self.stop, self.warn = config, stop, warn
        self.inputs = self._await(in_background(lambda: check_inputs(config, corpora), may_be_torn=True))
        if self.inputs.warning:
            warn(self.inputs.warning)
        self._found = in_background(lambda: find_run(config, self.inputs.corpora, resume), may_be_torn=False)
        if resume != "never" and self.found.notice:  # Told, or refused, before Ray starts.
            warn(self.found.notice)
        self._free = in_background(lambda: take_over or await_free_run(config, self._found.result()), may_be_torn=True)

    def check(self) -> None:
        """Raise where a person wants an end, or where something has been refused by now."""
        self.stop.check()
        for answer in (self._found, self._free):
            if answer.done():
                answer.result()  # A refusal does not wait for slots or workers.

    def finish(self) -> None:
        """Wait for what is still being checked."""
        self._await(self._free)
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


def find_origin(config: RunConfig) -> Origin | None:
    """Return the checkpoint that `train.init` names.

    Raises:
        ConfigError: there is none, it is of another model, or its optimizer's state is not this run's.
        StorageError: it cannot be read.
    """
    if not config.train.init:
        return None
    try:
        log, commit = find_commit(config.train.init, config.storage.s3_endpoint)
    except ConfigError as error:
        raise ConfigError(f"train.init={error}") from error
    manifest = Manifest.read(log.store, commit.manifest, commit.sha256)
    theirs, ours = (_what_it_is(config.model, one) for one in (manifest.identity["model"], asdict(config.model)))
    if differences := _differences({"model": theirs}, {"model": ours}):
        raise ConfigError(f"train.init={config.train.init} is another model:\n" + "\n".join(differences))
    check_state(config, manifest.identity.get("optim.name"))
    return Origin(run_url=log.store.url, manifest=manifest)


def _what_it_is(model: ModelConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in model.training_keys()}


def check_state(config: RunConfig, theirs: str | None) -> None:
    """Refuse to take an optimizer's state along that is not there, or another's, where `train.init_state` says so.

    Args:
        config: of the run.
        theirs: optimizer of what it begins with; None where that was imported or converted.

    Raises:
        ConfigError: it is not this run's.
    """
    ours = config.optim.name
    if config.train.init_state == "all" and theirs != ours:
        what = (
            f"has that of {theirs}, and optim.name={ours}" if theirs else "has none, for it was imported or converted"
        )
        raise ConfigError(
            f"train.init_state=all takes the optimizer's state along, and {config.train.init} {what}; set "
            "train.init_state=weights to begin the state anew"
        )


def other_tokens(identity: dict[str, Any], tokenizer: str) -> str:
    """Return that the weights to begin with know other tokens than a run's; empty where they do not.

    Args:
        identity: of their checkpoint. An import that came without a tokenizer has the ids of its special tokens; the
            end of a document in bytes is 0.
        tokenizer: hash of the run's; empty for bytes.
    """
    known = identity.get("data.tokenizer")
    bytes_ = "data" in identity or identity.get("hugging_face", {}).get("eos_token_id") == 0
    if known == tokenizer or (known is None and bytes_ and not tokenizer):
        return ""
    theirs = "bytes" if known is None and bytes_ else f"tokenizer {known[:12]}" if known else "a tokenizer of its own"
    ours = f"tokenizer {tokenizer[:12]}" if tokenizer else "bytes"
    return (
        f"train.init: {identity.get('imported', 'it')} was trained with {theirs}, and this run's tokens are of {ours}: "
        "its embeddings and its head mean something else, and are learned anew"
    )


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


def find_run(config: RunConfig, corpora: tuple[Corpus, ...], resume: str) -> Found:
    """Open the tracking store and find the run that `resume` means: `never`, `auto`, or a run's id or name.

    Raises:
        ConfigError: there is no such run, this config would make another run of it or leaves nothing to train, or
            `train.init` cannot be used.
        StorageError: the tracking store or the run's files cannot be read.
    """
    origin = find_origin(config) if resume == "never" else None  # Told at once: MLflow takes seconds to import.
    from orchestrator.record.tracking import Tracking

    tracking = Tracking(config.tracking)
    if resume == "never":
        return Found(tracking, origin=origin)
    run_id = tracking.unfinished(config.run.name) if resume == "auto" else tracking.find(resume)
    if run_id is None:
        finished = tracking.newest_finished(config.run.name)
        notice = new_beside(finished, config.run.name) if finished else ""
        return Found(tracking, origin=find_origin(config), notice=notice)
    log = RunLog(run_store(config, run_id))
    if log.identity is None:
        if resume == "auto":  # Its files are elsewhere: it is not ours to go on with.
            notice = (
                f"a new run begins: nothing of the unfinished one named {config.run.name}, {run_id}, is under "
                f"checkpoint.url={config.checkpoint.url}"
            )
            return Found(tracking, origin=find_origin(config), notice=notice)
        if tracking.submitted(run_id):
            return Found(tracking, run_id, find_origin(config))
        raise ConfigError(f"--resume {resume}: nothing of run {run_id} is under checkpoint.url={config.checkpoint.url}")
    check_identity(log, identity(config, corpora))
    reached = log.reached
    notice = check_steps(run_id, reached, config.train.steps, tracking.is_finished(run_id))
    # A run with checkpoints has no more need of its origin, which may be gone by now.
    return Found(tracking, log.run_id, None if log.commits else find_origin(config), log, notice)


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


def identity(config: RunConfig, corpora: tuple[Corpus, ...]) -> dict[str, Any]:
    """Return what has to be the same for a run to go on: otherwise it would be another run, silently."""
    return {
        "model": asdict(config.model),
        "optim.name": config.optim.name,
        **data_identity(config, corpora),
        "train.seq_len": config.train.seq_len,
        "seed": config.seed,
    }


def data_identity(run: RunConfig, corpora: tuple[Corpus, ...]) -> dict[str, Any]:
    """Return the part of it that `of_data` tells; of one source without a name the hash alone."""
    config, recipe = run.data, run.recipe
    batches = [[stage.first, stage.global_batch] for stage in recipe.stages]
    grown = [after for before, after in pairwise(batches) if after[1] != before[1]]
    if not config.sources:
        (corpus,) = corpora
        found: dict[str, Any] = {"data": corpus.content_hash}
    else:
        mixtures = [[step, *shares] for step, shares in recipe.mixtures(config)]
        found = {"data": {corpus.name: corpus.content_hash for corpus in corpora}, "data.mixture": mixtures}
    found["train.global_batch"] = batches[0][1]
    if grown:
        found["train.growth"] = grown
    if tokenizer := corpora[0].tokenizer:
        found["data.tokenizer"] = tokenizer
    if config.window:
        found["data.window"] = config.window
    if config.masks_documents:
        found["data.document_mask"] = True
    if templates := {corpus.chat_template for corpus in corpora if corpus.chat_template}:
        (found["data.chat_template"],) = templates
        found["data.packing"] = PACKING
    return found


def of_data(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that decides which tokens a step has."""
    batches = ("train.global_batch", "train.growth")
    return {key: value for key, value in identity.items() if key in batches or key.partition(".")[0] == "data"}


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


def check_identity(log: RunLog, wanted: dict[str, Any]) -> None:
    """Refuse a run of another model, other data or another batch; name every difference.

    Raises:
        ConfigError: going on would make another run of it, silently.
    """
    refuse_other(log.store.url, log.identity or {}, wanted, log.reached)


def refuse_other(url: str, saved: dict[str, Any], wanted: dict[str, Any], step: int) -> None:
    """Refuse to go on from what had another identity up to a step; name every difference.

    Weights and batches that hold from a later step on may be other ones: they move nothing before it.

    Raises:
        ConfigError: it has.
    """
    if differences := _differences(_until(saved, step), _until(wanted, step)):
        raise ConfigError(
            f"the run at {url} cannot go on with this config:\n"
            + "\n".join(differences)
            + "\nmake them equal, or start a new run with --resume never"
        )


def _until(identity: dict[str, Any], step: int) -> dict[str, Any]:
    found = dict(identity)
    for key in ("data.mixture", "train.growth"):
        if since := [change for change in found.pop(key, ()) if change[0] <= max(1, step)]:
            found[key] = since
    return found


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return a line for each key that only one of a checkpoint and a config has, or that differs."""
    has, wants = flatten(saved), flatten(wanted)
    return [
        f"  {key}: the checkpoint has {has.get(key)!r}, the config {wants.get(key)!r}"
        for key in {**wants, **has}
        if has.get(key) != wants.get(key)
    ]


def _make_folder(uri: str) -> None:
    """Make the folder of a tracking database."""
    if (file := database(uri)) is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"tracking.uri={uri}: the folder cannot be made ({error})") from error
