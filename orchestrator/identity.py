"""What makes a run the same run: what has to be alike for it to go on, or for another one to branch off from it."""

from dataclasses import asdict
from itertools import pairwise
from typing import Any

from orchestrator.config import RunConfig, flatten
from orchestrator.log.run_log import RunLog
from workers.common.errors import ConfigError
from workers.data.corpus import Corpus
from workers.data.packing import PACKING


def identity(config: RunConfig, corpora: tuple[Corpus, ...]) -> dict[str, Any]:
    """Return what has to be the same for a run to go on: otherwise it would be another run, silently."""
    return {
        "model": asdict(config.model),
        **config.optim.identity,
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
    if differences := differences_of(until(saved, step), until(wanted, step)):
        raise ConfigError(
            f"the run at {url} cannot go on with this config:\n"
            + "\n".join(differences)
            + "\nmake them equal, or start a new run with --resume never"
        )


def until(identity: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the part of an identity that decides what a run is up to a step."""
    found = dict(identity)
    for key in ("data.mixture", "train.growth"):
        if since := [change for change in found.pop(key, ()) if change[0] <= max(1, step)]:
            found[key] = since
    return found


def differences_of(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return a line for each key that only one of a checkpoint and a config has, or that differs."""
    has, wants = flatten(saved), flatten(wanted)
    return [
        f"  {key}: the checkpoint has {has.get(key)!r}, the config {wants.get(key)!r}"
        for key in {**wants, **has}
        if has.get(key) != wants.get(key)
    ]
