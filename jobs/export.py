"""`raymuon export`: a checkpoint's weights as a folder that Hugging Face's libraries read."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jobs.chat import ends_of_turn
from jobs.hugging_face import config_of, empty_tensors_of, refuse_unloadable, tensors_of, trained_with
from jobs.lineage import name_of
from jobs.model_card import model_card
from jobs.trained import finite_tensor, model_of, tokenizer_of, trained_here, undeleted
from orchestrator.config import database
from orchestrator.log.run_log import find_commit
from workers.checkpoint.manifest import BUFFER, WEIGHT, Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store, is_remote, shared_url
from workers.data.json_tokenizer import JINJA, read_template
from workers.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from orchestrator.record.tracking import Tracking

SHARD_BYTES = 4 << 30
"""Of an exported file, at most, but for a tensor that is larger."""
NEWEST = "newest"
"""The alias of the last of a series; MLflow keeps `latest` for itself."""
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    url: str
    step: int
    files: list[str]
    bytes: int
    run_id: str
    metrics: dict[str, float]
    """Known of the run at that step."""
    results: dict[str, float]
    """Of evaluations at that step, by `task/metric`."""
    stage: str
    """Of the run, at that step; empty where the run is one."""
    began_with: str
    """The checkpoint with whose weights the run has begun; empty for none."""


def export(
    url: str,
    to: str,
    dtype: Dtype,
    shard_bytes: int = SHARD_BYTES,
    s3_endpoint: str = "",
    evaluated: Mapping[int, dict[str, float]] | None = None,
) -> Exported:
    """Write the checkpoint at `URL[@STEP]` into the folder `to`, a local one or an fsspec URL.

    On S3 both are at this endpoint, where it is not AWS.

    `config.json` comes last: without it nobody takes the folder for a model. `evaluated` is what evaluations have found
    at each step, for the card.

    Raises:
        ConfigError: there is no such checkpoint, or something is in the folder already.
        StorageError: something is damaged or not finite, or could not be written.
    """
    log, commit = find_commit(url, s3_endpoint)
    with undeleted((log, commit)):
        manifest = Manifest.read(log.store, commit.manifest, commit.sha256)
    reader = CheckpointReader(log.store, manifest)
    model, tokenizer = model_of(manifest), tokenizer_of(log.store, manifest)
    about = _about(manifest, tokenizer)
    generation = about.pop("generation_config")
    refuse_unloadable(model)
    target = Store(shared_url(to), s3_endpoint)
    if target.names(""):
        raise ConfigError(f"--to {to}: something is there already; name a new folder")

    buffers, results = set(reader.names(BUFFER)), dict((evaluated or {}).get(manifest.step, {}))
    plan = _plan(manifest, 4 if dtype == "float32" else 2, shard_bytes)
    with undeleted((log, commit)), target.whole_or_nothing():
        where: dict[str, str] = {}
        for number, names in enumerate(plan, 1):
            file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            tensors = dict(_exported(reader, names, buffers))
            if number == len(plan):
                tensors |= empty_tensors_of(model)
            target.put(file, _encode(tensors, dtype, exact=buffers))
            where |= dict.fromkeys(tensors, file)
        size = sum(file.size for file in target.files("").values())
        texts = {
            "README.md": model_card(manifest, commit, model, tokenizer, dtype, buffers, results),
            **(tokenizer.files if tokenizer else {}),
        }
        if tokenizer and (known := manifest.identity.get("data.chat_template")):
            template = read_template(log.store, known, datetime.now())
            texts[JINJA] = template.source
            generation["eos_token_id"] = _with(generation["eos_token_id"], ends_of_turn(template, tokenizer))
        texts["generation_config.json"] = json.dumps(generation, indent=2)
        if len(plan) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": where}
            texts["model.safetensors.index.json"] = json.dumps(index, indent=2)
        texts["config.json"] = json.dumps(config_of(model, about, dtype), indent=2)
        for name, text in texts.items():
            target.put(name, text.encode())
    files = target.files("")
    size = sum(file.size for file in files.values())
    stage, ancestors = (manifest.lineage.stage, manifest.lineage.ancestors) if manifest.lineage else ("", ())
    known = (manifest.run_id, commit.metrics, results, stage, name_of(ancestors[0]) if ancestors else "")
    return Exported(target.url, manifest.step, sorted(files), size, *known)


def export_series(
    url: str,
    to: str,
    dtype: Dtype,
    s3_endpoint: str = "",
    evaluated: Mapping[int, dict[str, float]] | None = None,
) -> list[Exported]:
    """Write every checkpoint of the run at `url` into a folder `step-...` of its own under `to`."""
    log, _ = find_commit(url, s3_endpoint)
    return [
        export(
            f"{log.store.url}@{commit.step}",
            f"{to.rstrip('/')}/step-{commit.step:08d}",
            dtype,
            s3_endpoint=s3_endpoint,
            evaluated=evaluated,
        )
        for commit in log.commits
    ]


def recorded(
    url: str, tracking_uri: str, warn: Callable[[str], object], s3_endpoint: str = ""
) -> dict[int, dict[str, float]]:
    """Return what evaluations have found of the run at `url` at each step, as far as MLflow has it.

    An MLflow that does not answer is told to `warn`: the weights do not need it.

    Raises:
        ConfigError: there is no such run.
    """
    log, _ = find_commit(url, s3_endpoint)
    if (file := database(tracking_uri)) is not None and not file.exists():
        return {}
    from orchestrator.record.results import evaluations  # MLflow takes seconds to import.

    try:
        return evaluations(tracking_uri, log.run_id)
    except StorageError as error:
        warn(f"the card has no results of evaluations: {error}")
        return {}


def registry(model: str, to: str, tracking_uri: str) -> "Tracking":
    """Return the MLflow in which exports to the folder `to` can be versions of `model`.

    Asked before anything is written, which takes hours for a series of large models.

    Raises:
        ConfigError: it takes no such name, or no such folder.
        StorageError: the server is away, or refuses.
    """
    from orchestrator.config import TrackingConfig
    from orchestrator.record.registry import ask
    from orchestrator.record.tracking import Tracking

    if tracking_uri.startswith(("http://", "https://")) and not is_remote(Store(shared_url(to)).url):
        raise ConfigError(
            f"--register {model}: an MLflow server ({tracking_uri}) takes no folder of one machine; name a place that "
            "all reach, for instance --to s3://BUCKET/FOLDER, or a database as --tracking-uri, sqlite:///FILE"
        )
    ask(tracking := Tracking(TrackingConfig(uri=tracking_uri)), model)
    return tracking


def register(exported: Sequence[Exported], model: str, tracking: "Tracking") -> list[str]:
    """Make exported checkpoints versions of `model` in MLflow's registry, in the order of steps.

    A version has its step and its run's stage for aliases; the last of several is the `newest`, too.

    Returns:
        The numbers, in the order of `exported`.

    Raises:
        StorageError: the server is away, or refuses.
    """
    from orchestrator.record.registry import register as register_

    versions = {}
    in_order = sorted(exported, key=lambda one: one.step)
    for one in in_order:
        last_of_several = len(in_order) > 1 and one is in_order[-1]
        aliases = [f"step-{one.step}", *_alias_of(one.stage), *([NEWEST] if last_of_several else [])]
        about = {"stage": one.stage, "began_with": one.began_with}
        tags = {"raymuon.step": one.step, "raymuon.run_id": one.run_id, **one.metrics, **one.results}
        tags |= {f"raymuon.{key}": text for key, text in about.items() if text}
        try:
            versions[one.url] = register_(tracking, model, one.url, one.run_id, tags, aliases)
        except StorageError as error:
            done = f"{len(versions)} of {len(in_order)} registered as {model}"
            raise StorageError(f"{done}, from step {one.step} on not; what is exported is whole. {error}") from error
    return [versions[one.url] for one in exported]


def _alias_of(stage: str) -> list[str]:
    """Return the alias for a stage of this name, of letters that MLflow takes, and none that it keeps for itself."""
    alias = re.sub(r"[^\w-]", "-", stage)
    taken = alias.lower() in ("latest", NEWEST) or re.fullmatch(r"[vV]\d+|step-\d+", alias)
    return [f"stage-{alias}" if taken else alias] if alias else []


def _about(manifest: Manifest, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what `config.json` says beside the sizes, and `generation_config`."""
    identity = manifest.identity
    if tokenizer and trained_here(manifest):
        return trained_with(tokenizer, identity["train.seq_len"])
    if "hugging_face" not in identity:
        raise ConfigError(
            f"{manifest.run_id} was imported by an older raymuon, without its special tokens' ids; import it once more"
        )
    return dict(identity["hugging_face"])


def _with(end: int | None, more: Collection[int]) -> int | list[int] | None:
    """Return the tokens that end a text, as `generation_config.json` has them: several where a turn has its own."""
    others = sorted(set(more) - {end})
    return end if not others else others if end is None else [end, *others]


def _plan(manifest: Manifest, item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """Cut the names, in the model's order, into files of at most `shard_bytes`."""
    plan: list[list[str]] = [[]]
    size = 0
    for name, shape in manifest.shapes.items():
        added = int(np.prod(shape)) * item_bytes
        if plan[-1] and size + added > shard_bytes:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += added
    return plan


def _exported(reader: CheckpointReader, names: list[str], buffers: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        yield from tensors_of(name, finite_tensor(reader, BUFFER if name in buffers else WEIGHT, name))


def _encode(tensors: dict[str, np.ndarray], dtype: Dtype, exact: set[str]) -> bytes:
    """Return a safetensors file; buffers, such as what steers the choice of experts, are `exact` and stay fp32."""
    import torch
    from safetensors.torch import save

    kind = getattr(torch, dtype)
    converted = {
        name: torch.from_numpy(tensor).to(torch.float32 if name in exact else kind).contiguous()
        for name, tensor in tensors.items()
    }
    return save(converted, metadata={"format": "pt"})
