"""The card of an exported model: what it is, what it comes from, and the run's figures at its step."""

import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jobs import lineage
from jobs.trained import trained_here
from orchestrator.log.run_log import Entry
from orchestrator.record.metrics import STDERR
from workers.checkpoint.manifest import Manifest
from workers.common.text import visible
from workers.config import ModelConfig
from workers.data.tokenizer import BYTES, Tokenizer


def model_card(
    manifest: Manifest,
    commit: Entry,
    model: ModelConfig,
    tokenizer: Tokenizer | None,
    dtype: str,
    buffers: set[str],
    results: Mapping[str, float],
) -> str:
    """Return the card in Markdown.

    Args:
        manifest: of the checkpoint.
        commit: in its run's log.
        model: its architecture and sizes.
        tokenizer: that goes with it; None for none.
        dtype: of the exported weights.
        buffers: names of the tensors that are no parameters.
        results: of evaluations at this step, by `task/metric`.
    """
    parameters = sum(int(np.prod(shape)) for name, shape in manifest.shapes.items() if name not in buffers)
    rows: dict[str, Any] = {
        "architecture": model.name,
        "parameters": f"{parameters:,}",
        "weights": dtype,
        "training run": manifest.run_id,
        "step": manifest.step,
        "tokens": f"{manifest.counters['tokens']:,}",
        **_training(manifest),
        **{f"{name} (nats per token)": f"{value:.4f}" for name, value in sorted(commit.metrics.items())},
        "saved": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(commit.time)),
        **lineage.told(manifest.lineage, places=False),
    }
    loaded = '\ntokenizer = AutoTokenizer.from_pretrained(".")' if tokenizer else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {_plain(manifest.run_id)} at step {manifest.step}

{_origin(manifest)} {_tokens(manifest, tokenizer)}

| | |
| --- | --- |
{_table(rows)}
{_evaluated(results)}
```python
from transformers import {"AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"}

model = AutoModelForCausalLM.from_pretrained("."){loaded}
```
"""


def _origin(manifest: Manifest) -> str:
    if how := manifest.identity.get("converted"):
        return f"Made by raymuon of the dense model {_plain(how)}; not trained since."
    if not trained_here(manifest):
        return "Imported into raymuon and exported again, not trained."
    if manifest.lineage and manifest.lineage.ancestors:
        return f"Trained with raymuon from the weights of {_plain(lineage.name_of(manifest.lineage.ancestors[0]))}."
    return "Pretrained with raymuon."


def _tokens(manifest: Manifest, tokenizer: Tokenizer | None) -> str:
    if tokenizer is BYTES:
        return "The tokens are bytes; a zero byte ends a document."
    if trained_here(manifest) and tokenizer:
        return f"Its {tokenizer.vocab_size:,} tokens are those of the tokenizer beside it."
    return "The tokenizer is the original's."


def _training(manifest: Manifest) -> dict[str, Any]:
    """Return the rows about the training; of an imported model, where it came from."""
    identity = manifest.identity
    if "converted" in identity:
        return {"converted from": identity["converted"]}
    if "data" not in identity:
        return {"imported from": identity["imported"]}
    data = identity["data"]
    hashes = {f"SHA-256 of {name}": one for name, one in data.items()} if isinstance(data, dict) else {}
    tokenizer = identity.get("data.tokenizer")
    grown = [change for change in identity.get("train.growth", ()) if change[0] <= manifest.step]
    return {
        "optimizer": identity["optim.name"],
        "sequence length": identity["train.seq_len"],
        "global batch": f"{identity['train.global_batch']} sequences"
        + "".join(f", {batch} from step {step:,} on" for step, batch in grown),
        **(hashes or {"SHA-256 of the data": data}),
        **({"SHA-256 of the tokenizer": tokenizer} if tokenizer else {}),
    }


def _evaluated(results: Mapping[str, float]) -> str:
    if not results:
        return ""
    told = {
        name: f"{value:.4f}" + (f" ± {error:.4f}" if (error := results.get(f"{name}{STDERR}")) is not None else "")
        for name, value in sorted(results.items())
        if not name.endswith(STDERR)
    }
    return f"\n| evaluation | |\n| --- | --- |\n{_table(told)}\n"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"| {_plain(key)} | {_plain(value)} |" for key, value in rows.items())


def _plain(value: Any) -> str:
    """Return Markdown of one line that shows a text as it is: names of runs, folders, stages and tasks are people's."""
    return re.sub(r"[\\`*\[\]<>|~&]|\b_|_\b", r"\\\g<0>", " ".join(visible(str(value)).split()))
