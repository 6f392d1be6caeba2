"""One config of `bench model`: our model and transformers' with the same weights, a training step of each in turns.

Started as `python -m jobs.bench.model_step CONFIG.yaml ROUNDS FOLDER`; prints what came out as JSON. The losses of all
have to agree before anything is timed. What is timed is the processor's time: one thread computes and nobody waits, so
on a machine of one's own that is the clock's, and on a shared one it leaves out the turns of others.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.hugging_face import config_of, empty_tensors_of, refuse_unloadable, tensors_of, trained_with
from jobs.load import load
from jobs.tell import tell
from workers.common.errors import TrainingError
from workers.config import ModelConfig, MoonlightConfig
from workers.data.tokenizer import BYTES
from workers.models import LanguageModel, build
from workers.models.compiled import compile_layers
from workers.objective import Batch, batch_of, summed_loss

WARMUP = 2
"""Rounds that are not counted."""
TOLERANCE = 1e-4
"""Relative, of a loss."""
HOPELESS = 4.0
"""A way of transformers' whose first steps take so many times the fastest's is left out of the rounds."""
EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""transformers' ways to compute experts that run on a CPU."""
LR = 1e-4

Step = Callable[[], float]
"""Train once; returns the loss before it."""


def main(config_path: str, rounds: int, folder: str) -> None:
    """Measure, in this process and with its threads."""
    config = load(config_path, [])
    torch.manual_seed(config.seed)
    tokens = torch.randint(0, config.model.vocab_size, (config.train.micro_batch, config.train.seq_len + 1))
    batch = batch_of(tokens)
    write_for_transformers(_made(config.model, config.seed), config.model, config.train.seq_len, folder)
    mixture = isinstance(config.model, MoonlightConfig)

    steps: dict[str, Step] = {}
    steps["ours"] = _step_of_ours(_made(config.model, config.seed), batch)
    compiled = _made(config.model, config.seed)
    compile_layers(compiled)
    steps["ours_compiled"] = _step_of_ours(compiled, batch)
    for experts in EXPERTS if mixture else ("",):
        steps["_".join(filter(None, ("theirs", experts)))] = _step_of_theirs(_loaded(folder, experts), batch)
    for whole in (False, True):
        rival = _loaded(folder, "grouped_mm" if mixture else "")  # Eager experts are no graph: their sizes are data.
        for part in [rival] if whole else rival.model.layers:
            part.compile(dynamic=False)
        steps[f"theirs_compiled_{'whole' if whole else 'layers'}"] = _step_of_theirs(rival, batch)
    first_step_s = agree(steps)
    if isinstance(config.model, MoonlightConfig):
        for name, model in like_and_dense(config.model).items():
            steps[name] = _step_of_ours(_made(model, config.seed), batch)

    seconds = in_turns(steps, rounds)
    theirs = [name for name in seconds if name.startswith("theirs")]
    plain = min((name for name in theirs if "compiled" not in name), key=seconds.__getitem__)
    compiled_way = min((name for name in theirs if "compiled" in name), key=seconds.__getitem__)
    found: dict[str, Any] = {
        "ratio_to_transformers": seconds[plain] / seconds["ours"],
        "ratio_compiled": seconds[compiled_way] / seconds["ours_compiled"],
        "compiled_over_plain": seconds["ours"] / seconds["ours_compiled"],
        "transformers": [plain, compiled_way],
    }
    if mixture:
        found["moe_over_dense"] = seconds["mixture"] / seconds["dense"]
    positions = config.train.micro_batch * config.train.seq_len
    tell(
        {
            **found,
            "tokens_per_second": {name: positions / taken for name, taken in seconds.items()},
            "first_step_s": first_step_s,
            "threads": torch.get_num_threads(),
        }
    )


def write_for_transformers(model: LanguageModel, config: ModelConfig, seq_len: int, folder: str) -> None:
    """Write the model as an export does, but for what no computation needs."""
    from safetensors.torch import save_file

    refuse_unloadable(config)
    named = (pair for name, one in model.state_dict().items() for pair in tensors_of(name, one.numpy()))
    tensors = {name: torch.from_numpy(one).contiguous() for name, one in (*named, *empty_tensors_of(config).items())}
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    about = {key: value for key, value in trained_with(BYTES, seq_len).items() if key != "generation_config"}
    (Path(folder) / "config.json").write_text(json.dumps(config_of(config, about, "float32")))


def like_and_dense(config: MoonlightConfig) -> dict[str, MoonlightConfig]:
    """Return a mixture and a dense model of as many activated parameters, but for the routers'."""
    width = (config.num_experts_per_token + config.num_shared_experts) * config.moe_intermediate_size
    mixture = replace(config, intermediate_size=width)
    return {"mixture": mixture, "dense": replace(mixture, num_dense_layers=config.num_layers)}


def agree(steps: dict[str, Step]) -> dict[str, float]:
    """Take the first step of each, and return its seconds.

    Raises:
        TrainingError: the losses before it differ by more than rounding.
    """
    losses, seconds = {}, {}
    for name, step in steps.items():
        begin = time.perf_counter()
        losses[name] = step()
        seconds[name] = time.perf_counter() - begin
    expected = next(iter(losses.values()))
    if wrong := {name: loss for name, loss in losses.items() if not abs(loss / expected - 1) <= TOLERANCE}:
        raise TrainingError(f"the same weights and batch have another loss than {expected}: {wrong}")
    return seconds


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each, in rounds of one step each; hopeless ways of theirs are left out."""
    order, taken = random.Random(0), {name: [] for name in steps}
    for round_ in range(WARMUP + rounds):
        if round_ == WARMUP:
            theirs = [name for name in taken if name.startswith("theirs")]
            slowest = HOPELESS * min((min(taken[name]) for name in theirs), default=0.0)
            taken = {name: [] for name in taken if name not in theirs or min(taken[name]) <= slowest}
        # In another order every round: the machine's speed drifts, and each leaves the caches to the next.
        for name in order.sample(list(taken), len(taken)):
            begin = time.process_time()
            steps[name]()
            taken[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def _made(config: ModelConfig, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return build(config)


def _loaded(folder: str, experts: str) -> Any:
    from transformers import AutoModelForCausalLM

    way = {"experts_implementation": experts} if experts else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, **way
    )
    model, told = loaded
    if told["missing_keys"] or told["unexpected_keys"]:
        raise TrainingError(f"transformers loads other weights than these: {told}")
    return model.train()


def _step_of_ours(model: LanguageModel, batch: Batch) -> Step:
    return _step(model, lambda: summed_loss(model(*batch.given), model.head, batch.targets) / batch.counted)


def _step_of_theirs(model: Any, batch: Batch) -> Step:
    def loss() -> Tensor:
        logits = model(input_ids=batch.inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    return _step(model, loss)


def _step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
