"""Fine-tuning against transformers and a plain PyTorch loop; what a run may begin with."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import starmap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jobs.export import export
from jobs.origin import with_checkpoint
from optim.config import OptimConfig
from orchestrator.config import RunConfig
from orchestrator.origin import find_origin
from tests.chats import CHATML, LLAMA_3, many, tokenizer, write
from tests.closeness import ADAMW_EPS
from tests.jobs.test_export import MODELS, trained
from tests.leading import Lead, config_of, tensors_of
from tests.processes import ProcessCluster
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from workers.checkpoint.manifest import WEIGHT
from workers.common.errors import ConfigError
from workers.config import CheckpointConfig
from workers.data.config import DataConfig
from workers.data.conversations import split_of
from workers.data.ends import DocumentEnds
from workers.data.packing import packing_of
from workers.data.prepare import prepare
from workers.feed import indices_of_step, order_of
from workers.recipe import TrainConfig
from workers.reports import StepDone, Validated
from workers.task import Task

STEPS, WARMUP, LR, BIAS_RATE = 5, 2, 2e-3, 0.05
BIAS = "e_score_correction_bias"


def tuned(rank: int, world_size: int, task: Task) -> dict:
    trainer, told = trainer_of(rank, world_size, task, restore=True)
    trainer.run()
    return {
        "biases": biases_of(trainer.engine.model),
        "imbalances": [fields["expert_imbalance"] for fields in told.of(StepDone)],
        "losses": [fields["loss"] for fields in told.of(StepDone)],
        "tokens": [fields["step_tokens"] for fields in told.of(StepDone)],
        "validation": [fields["loss"] for fields in told.of(Validated)],
    }


def biases_of(model: torch.nn.Module) -> list[list[float]]:
    return [buffer.tolist() for name, buffer in model.named_buffers() if name.endswith(BIAS)]


def task_of(folder, name: str, template: str, end: str, schedule: str) -> tuple[Task, list]:
    """A model of Hugging Face's that is tuned on conversations, and these."""
    model = replace(MODELS[name], vocab_size=384)
    if name == "moonlight":
        model = replace(model, router_bias_rate=BIAS_RATE)
    trained(folder / "pretrained", model)
    export(f"{folder}/pretrained", f"{folder}/hf", "float32")
    rows = many(60)
    data = DataConfig(
        source=str(write(folder / "chat.jsonl", rows)),
        format="chat",
        tokenizer=str(tokenizer(folder / "tokenizer", template, end)),
        prepared_url=f"{folder}/data",
        held_out_fraction=0.2,
    )
    settings = {"lr": LR, "warmup_steps": WARMUP, "final_lr_fraction": 0.1, "eps": ADAMW_EPS}
    optim = OptimConfig(name="adamw", schedule=schedule, **settings)
    train = TrainConfig(steps=STEPS, global_batch=6, micro_batch=2, seq_len=160, validate_sequences=4, validate_every=0,
                        sample_prompt="", init=f"{folder}/hf")  # fmt: skip
    config = RunConfig(model=model, optim=optim, data=data, train=train,
                       checkpoint=CheckpointConfig(url=f"{folder}/checkpoints"))  # fmt: skip
    config = with_checkpoint(config, lambda text: None)
    task = Task(
        **{key: getattr(config, key) for key in ("model", "optim", "data", "train", "checkpoint")},
        seed=3,
        corpora=prepare(data),
        run_url=f"{folder}/run",
        attempt=1,
        manifest=None,
        origin=find_origin(config),
    )
    return task, rows


def rows_of(task: Task, split: str, samples: list[int], rows: list) -> list[tuple[list, bool]]:
    """Return the conversations of sequences, out of the file, and whether there is room for a token behind each."""
    (corpus,) = task.corpora
    shards = getattr(corpus, split)
    packing, ends = packing_of(corpus, shards, task.train.seq_len), DocumentEnds(corpus, shards)
    found = []
    for ranges in map(packing.documents, samples):
        room = packing.capacity - sum(stop - start for start, stop in ranges)
        found += [(rows[ends.stretches(*one)[0].row - 1], one != ranges[-1] or room > 0) for one in ranges]
    return found


@contextmanager
def balanced(model: torch.nn.Module, imbalances: list[float]) -> Iterator[None]:
    """Move the biases of transformers' routers against the tokens that each expert gets (Moonlight, appendix C)."""
    routers = [module for module in model.modules() if hasattr(module, BIAS)]
    loads = {router: torch.zeros(router.num_experts) for router in routers}

    def count(router: torch.nn.Module, _: object, found: tuple) -> None:
        loads[router] += torch.bincount(found[2].flatten(), minlength=router.num_experts)

    hooks = [router.register_forward_hook(count) for router in routers]
    yield
    imbalances.append(max([(load.max() / load.mean()).item() for load in loads.values()], default=0.0))
    for hook, (router, load) in zip(hooks, loads.items(), strict=True):
        hook.remove()
        direction = torch.sign(load.mean() - load)
        getattr(router, BIAS).add_(BIAS_RATE * (direction - direction.mean()))


def plain_loop(task: Task, rows: list) -> dict:
    """Tune with transformers and torch alone: one conversation after the other, each by itself, masked by transformers.

    Only which conversations a step has is asked of us.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = task.data.tokenizer
    made = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/../hf", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.95), ADAMW_EPS, weight_decay=0.1)

    def summed(messages: list, room: bool) -> tuple[torch.Tensor, int]:
        found = made.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor([found["input_ids"]]), torch.tensor(found["assistant_masks"], dtype=torch.bool)
        read = ids if room else ids[:, :-1]  # The last token of a full sequence is a target alone.
        logits = model(read, use_cache=False).logits[0, : len(mask) - 1][mask[1:]]
        return F.cross_entropy(logits, ids[0, 1:][mask[1:]], reduction="sum"), int(mask[1:].sum())

    def mean(batch: list) -> tuple[torch.Tensor, int]:
        losses, counts = zip(*starmap(summed, batch), strict=True)
        return torch.stack(losses).sum() / sum(counts), sum(counts)

    @torch.no_grad()
    def validate() -> float:
        (corpus,) = task.corpora
        number = packing_of(corpus, corpus.validation, task.train.seq_len).num_samples
        count = min(task.train.validate_sequences, number)
        return mean(rows_of(task, "validation", [i * number // count for i in range(count)], rows))[0].item()

    order = order_of(task.data, task.recipe, task.train.seq_len, task.seed, task.corpora)
    losses, tokens, imbalances, validation = [], [], [], [validate()]
    for step in range(1, STEPS + 1):
        batch = rows_of(task, "train", order.at(indices_of_step(task.recipe, step)).sample.tolist(), rows)
        with balanced(model, imbalances):
            loss, count = mean(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        left = 1 - (step - WARMUP) / (STEPS - WARMUP)
        left = 0.5 - 0.5 * math.cos(math.pi * left) if task.optim.schedule == "cosine" else left
        optimizer.param_groups[0]["lr"] = LR * (step / WARMUP if step <= WARMUP else 0.1 + 0.9 * left)
        optimizer.step()
        losses.append(loss.item())
        tokens.append(count)
    validation.append(validate())
    found = {"losses": losses, "tokens": tokens, "imbalances": imbalances, "validation": validation}
    return {**found, "biases": biases_of(model)}


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("name", "template", "end", "schedule", "world_size"),
    [("llama", CHATML, "<|im_end|>", "linear", 1), ("moonlight", LLAMA_3, "<|eot_id|>", "cosine", 2)],
)
def test_fine_tuning_is_transformers_and_a_plain_loop(tmp_path, name, template, end, schedule, world_size):
    task, rows = task_of(tmp_path, name, template, end, schedule)
    found = run_ranks(world_size, tuned, task)[0]
    plain = plain_loop(task, rows)
    losses = plain["losses"]
    assert found["tokens"] == plain["tokens"] and len(losses) == STEPS
    for key in ("losses", "validation", "imbalances", "biases"):
        assert np.abs(np.subtract(found[key], plain[key])).max(initial=0) < 1e-5, key
    assert abs(losses[-1] - losses[0]) > 1e-3, "something is learned, or it would all be equal"


def state_of(rank: int, world_size: int, task: Task) -> dict:
    """Return what a run begins with: the counters, AdamW's count of steps, and every piece of the state."""
    trainer, _ = trainer_of(rank, world_size, task, restore=True)
    optimizer, pieces = trainer.engine.optimizer, {}
    for group in optimizer.flat_state(rank):
        for kind, tensor in group.tensors.items():
            for one in group.fragments:
                piece = tensor[one.offset : one.offset + one.length].float().numpy().copy()
                pieces[kind, one.name, one.start] = piece
    return {"counters": trainer.counters, "applied": optimizer.applied_steps, "pieces": pieces}


def tuned_in_a_run(folder) -> tuple[RunConfig, Lead]:
    """Train three steps on conversations in bytes, with Muon and one worker."""
    chat = DataConfig(source=str(write(folder / "chat.jsonl", many(60))), format="chat",
                      prepared_url=f"{folder}/data", held_out_fraction=0.2)  # fmt: skip
    settings = {"scaling": {"min_workers": 1, "max_workers": 1}, "checkpoint": {"every": 3}}
    config = replace(config_of(folder, train={"steps": 3, "seq_len": 256}, **settings), data=chat)
    with Lead(config, ProcessCluster({"a": 1}), folder) as first:
        first.wait()
    return config, first


def test_the_optimizer_s_state_is_taken_along_or_begun_anew_as_the_config_says(tmp_path):
    """At another world size. Steps begin at 1 either way; AdamW's moments keep the count of those that made them."""
    config, first = tuned_in_a_run(tmp_path)
    before, chat = tensors_of(f"{tmp_path}/run"), config.data
    for choice in ("weights", "all"):
        train = replace(config.train, init=f"{tmp_path}/run", init_state=choice)
        began = replace(config, data=chat, train=train)
        task = replace(first.attempt.task, data=chat, train=train, corpora=prepare(chat), origin=find_origin(began))
        seen = set()
        for found in run_ranks(2, state_of, task):
            assert found["counters"].step == found["counters"].tokens == 0
            assert found["applied"] == found["counters"].applied_steps == (3 if choice == "all" else 0)
            for (kind, name, start), piece in found["pieces"].items():
                expected = before[kind, name].ravel()[start : start + len(piece)]
                if kind != WEIGHT and choice == "weights":
                    expected = np.zeros_like(expected)
                assert np.array_equal(piece, expected), (kind, name)
                seen.add(kind)
        assert seen == {WEIGHT, "momentum_buffer", "exp_avg", "exp_avg_sq"}
    other = replace(began, optim=replace(config.optim, name="adamw"))
    with pytest.raises(ConfigError, match=r"has that of muon, and optim.name=adamw; set train.init_state=weights"):
        find_origin(other)
    assert find_origin(replace(other, train=replace(train, init_state="weights"))) is not None
    assert_exported_with_its_template(tmp_path, first)


def assert_exported_with_its_template(folder, lead: Lead) -> None:
    """Transformers writes the run's conversations as they were written for the run, and knows the assistant's part."""
    from transformers import AutoTokenizer

    export(f"{folder}/run", f"{folder}/exported", "float32")
    loaded, (corpus,) = AutoTokenizer.from_pretrained(f"{folder}/exported"), lead.corpora
    split, ends = split_of(corpus, corpus.train, 256), DocumentEnds(corpus, corpus.train)
    for sample in range(10):
        tokens, counts = split.sample(sample), split.counts(sample)
        for start, stop in split.ranges(sample):
            messages = many(60)[ends.stretches(start, stop)[0].row - 1]
            found = loaded.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            assert found["input_ids"] == tokens[: stop - start].tolist()
            assert found["assistant_masks"] == counts[: stop - start].astype(int).tolist()
            tokens, counts = tokens[stop - start :], counts[stop - start :]


def test_a_hugging_face_folder_is_imported_once_and_again_when_it_changes(folder_of, tmp_path):
    folder, told = folder_of("llama"), []
    config = config_of(tmp_path, train={"init": str(folder)}, checkpoint={"url": f"{tmp_path}/checkpoints"})
    url = with_checkpoint(config, told.append).train.init
    assert "imported as" in told[-1] and url.startswith(f"{tmp_path}/checkpoints/imports/")
    assert with_checkpoint(config, told.append).train.init == url and "as it was imported before" in told[-1]
    max((Path(url) / "log").glob("*.json")).unlink()  # As if the import had been killed before its commit.
    again = with_checkpoint(config, told.append).train.init
    assert again != url and "imported as" in told[-1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert with_checkpoint(config, told.append).train.init not in (url, again)
    told_all = replace(config, model=MODELS["llama"], train=replace(config.train, init=again, init_state="all"))
    with pytest.raises(ConfigError, match="has none, for it was imported"):
        find_origin(told_all)
    imports = sorted(Path(url).parent.iterdir())
    (folder / "generation_config.json").unlink()
    for init, choice, why in ((str(folder), "all", "has none, for it was imported"), (f"{folder}@3", "weights", "@3")):
        with pytest.raises(ConfigError, match=why):
            with_checkpoint(replace(config, train=replace(config.train, init=init, init_state=choice)), told.append)
    assert sorted(Path(url).parent.iterdir()) == imports, "refused before it is imported"


def test_a_run_may_begin_where_another_has_ended_by_its_name(tmp_path):
    from orchestrator.record.tracking import Tracking

    config = config_of(tmp_path)
    config = replace(config, tracking=replace(config.tracking, uri=f"sqlite:///{tmp_path}/mlflow.db"))
    tracking, told = Tracking(config.tracking), []
    run_id = tracking.create("pretrained", {"seed": 0})
    tracking.client.set_tag(run_id, "raymuon.checkpoint_url", f"{tmp_path}/checkpoints/{run_id}")

    def begun(init: str) -> str:
        return with_checkpoint(replace(config, train=replace(config.train, init=init)), told.append).train.init

    url = f"{tmp_path}/checkpoints/{run_id}"
    assert begun("pretrained") == begun(run_id) == url and begun("pretrained@7") == f"{url}@7"
    for kept in ("", url, f"{url}@7", "s3://bucket/run@7", str(tmp_path)):
        assert begun(kept) == kept
    with pytest.raises(
        ConfigError, match=r"train.init=nobody: there is no such folder, and as a run: .*no run of that"
    ):
        begun("nobody")
