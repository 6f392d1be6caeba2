"""`raymuon export`: a checkpoint's weights as a folder that Hugging Face's libraries read."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jobs.hugging_face import config_of, empty_tensors_of, refuse_unloadable, tensors_of, trained_with
from jobs.trained import finite_tensor, model_of, tokenizer_of, trained_here
from orchestrator.log.run_log import Entry, find_commit
from workers.checkpoint.manifest import BUFFER, WEIGHT, Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.common.errors import ConfigError
from workers.common.storage import Store, shared_url
from workers.config import ModelConfig
from workers.data.tokenizer import BYTES, Tokenizer

SHARD_BYTES = 4 << 30
"""Of an exported file, at most, but for a tensor that is larger."""
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


def export(url: str, to: str, dtype: Dtype, shard_bytes: int = SHARD_BYTES, s3_endpoint: str = "") -> Exported:
    """Write the checkpoint at `URL[@STEP]` into the folder `to`, a local one or an fsspec URL.

    On S3 both are at this endpoint, where it is not AWS.

    `config.json` comes last: without it nobody takes the folder for a model.

    Raises:
        ConfigError: there is no such checkpoint, or something is in the folder already.
        StorageError: something is damaged or not finite, or could not be written.
    """
    log, commit = find_commit(url, s3_endpoint)
    manifest = Manifest.read(log.store, commit.manifest, commit.sha256)
    reader = CheckpointReader(log.store, manifest)
    model, tokenizer = model_of(manifest), tokenizer_of(log.store, manifest)
    about = _about(manifest, tokenizer)
    generation = about.pop("generation_config")
    refuse_unloadable(model)
    target = Store(shared_url(to), s3_endpoint)
    if target.names(""):
        raise ConfigError(f"--to {to}: something is there already; name a new folder")

    buffers = set(reader.names(BUFFER))
    plan = _plan(manifest, 4 if dtype == "float32" else 2, shard_bytes)
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
        "README.md": _card(manifest, commit, model, tokenizer, dtype, buffers),
        "generation_config.json": json.dumps(generation, indent=2),
        **(tokenizer.files if tokenizer else {}),
    }
    if len(plan) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        texts["model.safetensors.index.json"] = json.dumps(index, indent=2)
    texts["config.json"] = json.dumps(config_of(model, about, dtype), indent=2)
    for name, text in texts.items():
        target.put(name, text.encode())
    files = target.files("")
    size = sum(file.size for file in files.values())
    return Exported(target.url, manifest.step, sorted(files), size, manifest.run_id, commit.metrics)


def export_series(url: str, to: str, dtype: Dtype, s3_endpoint: str = "") -> list[Exported]:
    """Write every checkpoint of the run at `url` into a folder `step-...` of its own under `to`."""
    log, _ = find_commit(url, s3_endpoint)
    return [
        export(
            f"{log.store.url}@{commit.step}",
            f"{to.rstrip('/')}/step-{commit.step:08d}",
            dtype,
            s3_endpoint=s3_endpoint,
        )
        for commit in log.commits
    ]


def register(exported: Exported, model: str, tracking_uri: str) -> str:
    """Make an exported model the next version of `model` in MLflow's registry, and return its number.

    Raises:
        StorageError: the server is away, or refuses.
    """
    from orchestrator.config import TrackingConfig
    from orchestrator.record.tracking import Tracking

    tracking = Tracking(TrackingConfig(uri=tracking_uri))
    tags = {"raymuon.step": exported.step, "raymuon.run_id": exported.run_id, **exported.metrics}
    return tracking.register(model, exported.url, exported.run_id, tags)


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


def _training(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the card's rows about the training; of an imported model, where it came from."""
    if "data" not in identity:
        return {"imported from": identity["imported"]}
    return {
        "optimizer": identity["optim.name"],
        "sequence length": identity["train.seq_len"],
        "global batch": f"{identity['train.global_batch']} sequences",
        "SHA-256 of the data": identity["data"],
    }


def _card(
    manifest: Manifest, commit: Entry, model: ModelConfig, tokenizer: Tokenizer | None, dtype: str, buffers: set[str]
) -> str:
    """Return the model card: where the weights come from, and the run's figures."""
    parameters = sum(int(np.prod(shape)) for name, shape in manifest.shapes.items() if name not in buffers)
    rows: dict[str, Any] = {
        "architecture": model.name,
        "parameters": f"{parameters:,}",
        "weights": dtype,
        "training run": manifest.run_id,
        "step": manifest.step,
        "tokens": f"{manifest.counters['tokens']:,}",
        **_training(manifest.identity),
        **{f"{name} (nats per token)": f"{value:.4f}" for name, value in sorted(commit.metrics.items())},
        "saved": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(commit.time)),
    }
    here = trained_here(manifest)
    if tokenizer is BYTES:
        tokens = "The tokens are bytes; a zero byte ends a document."
    elif here and tokenizer:
        tokens = f"Its {tokenizer.vocab_size:,} tokens are those of the tokenizer beside it."
    else:
        tokens = "The tokenizer is the original's."
    pretrained = "Pretrained with raymuon." if here else "Imported into raymuon and exported again, not trained."
    loaded = '\ntokenizer = AutoTokenizer.from_pretrained(".")' if tokenizer else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {manifest.run_id} at step {manifest.step}

{pretrained} {tokens}

| | |
| --- | --- |
{table}

```python
from transformers import {"AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"}

model = AutoModelForCausalLM.from_pretrained("."){loaded}
```
"""
