"""The checkpoint that a new run begins with: whether it can be used, for its weights or as the past of a branch."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.identity import differences_of, identity, until
from orchestrator.log.run_log import find_commit
from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError
from workers.config import ModelConfig
from workers.data.corpus import Corpus
from workers.task import Origin


def beginning(config: RunConfig, corpora: tuple[Corpus, ...], known: Origin | None) -> Origin | None:
    """Return what a run begins with, as `find_origin`, and refuse a branch of what was trained otherwise."""
    origin = find_origin(config, known)
    if origin is not None and config.train.init_state == "run":
        check_branch(config, origin.manifest, identity(config, corpora))
    return origin


def find_origin(config: RunConfig, known: Origin | None = None) -> Origin | None:
    """Return the checkpoint that `train.init` names.

    Args:
        config: of the run.
        known: that checkpoint, where somebody has it already.

    Raises:
        ConfigError: there is none, it is of another model, or its optimizer's state is not this run's.
        StorageError: it cannot be read.
    """
    if not config.train.init:
        return None
    origin = known or read_origin(config.train.init, config.storage.s3_endpoint)
    identity = origin.manifest.identity
    theirs, ours = (_what_it_is(config.model, one) for one in (identity["model"], asdict(config.model)))
    if differences := differences_of({"model": theirs}, {"model": ours}):
        raise ConfigError(f"train.init={config.train.init} is another model:\n" + "\n".join(differences))
    check_state(config, identity.get("optim.name"))
    return origin


def read_origin(init: str, s3_endpoint: str = "") -> Origin:
    """Return the checkpoint that a value of `train.init` names.

    Raises:
        ConfigError: there is none.
        StorageError: it cannot be read.
    """
    try:
        log, commit = find_commit(init, s3_endpoint)
    except ConfigError as error:
        raise ConfigError(f"train.init={error}") from error
    return Origin(run_url=log.store.url, manifest=Manifest.read(log.store, commit.manifest, commit.sha256))


def _what_it_is(model: ModelConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in model.training_keys()}


def check_state(config: RunConfig, theirs: str | None) -> None:
    """Refuse to take an optimizer's state along that is not there, or another's, where `train.init_state` says so.

    Args:
        config: of the run.
        theirs: optimizer of what it begins with; None where that was imported.

    Raises:
        ConfigError: it is not this run's.
    """
    ours, state = config.optim.name, config.train.init_state
    if state != "weights" and theirs != ours:
        what = f"has that of {theirs}, and optim.name={ours}" if theirs else "has none, for it was imported"
        raise ConfigError(
            f"train.init_state={state} takes the optimizer's state along, and {config.train.init} {what}; set "
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


def check_branch(config: RunConfig, parent: Manifest, wanted: dict[str, Any]) -> None:
    """Refuse a branch that has not been trained as its parent up to where it begins, or that has no step of its own.

    Args:
        config: of the branch.
        parent: the checkpoint that it goes on from.
        wanted: the branch's identity.

    Raises:
        ConfigError: with every difference.
    """
    init, step = config.train.init, parent.step
    saved, ours = ({key: one[key] for key in one if key != "model"} for one in (parent.identity, wanted))
    if differences := differences_of(until(saved, step), until(ours, step)):
        raise ConfigError(
            f"train.init_state=run: a branch of {init} was trained as its parent up to step {step}, and here differs\n"
            + "\n".join(differences)
            + "\nmake them equal. What is new in the branch, a batch or weights of sources, is said by train.stages, "
            f"of which the first are the parent's and come to {step} steps. init_state=weights or all begin at step 1"
        )
    if config.train.steps <= step:
        raise ConfigError(
            f"train.steps={config.train.steps}: a branch of {init} begins with step {step + 1}, and nothing is left to "
            "train; steps count from the parent's first one"
        )
