"""`raymuon study moonlight`: what the Moonlight paper did, at the demo's size, from text to table, on one machine.

A tokenizer of one's own text; two pretrainings in stages, by Muon and by AdamW, the first of which loses a worker; both
fine-tuned by both optimizers, from several seeds; evaluation, spectra, an export and what transformers writes with it.
Each part is a command that a person would give, in a process of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jobs.bench.process import raymuon, run_json
from jobs.load import load
from workers.common.errors import ConfigError, TrainingError

VOCAB = 1024
PEAKS = {"muon": 1.6e-2, "adamw": 3e-3}
"""Of the pretrainings: each optimizer's best of three on the demo (docs/benchmarks.md)."""
TUNING = {"muon": 4e-3, "adamw": 1e-3}
"""Peaks of the fine-tunings."""
TASKS = "stdlib"
PROMPT, WRITTEN = "def main(", 64


@dataclass(frozen=True)
class Place:
    """Where all of it is kept, and who is told how far it is."""

    folder: Path
    say: Callable[[str], object]

    @property
    def uri(self) -> str:
        """MLflow's."""
        return f"sqlite:///{self.folder}/mlflow.db"

    def told(self, *arguments: str) -> Any:
        """Run a command, and return what it tells."""
        began = time.monotonic()
        found = run_json(raymuon(*arguments, "--json"))
        self.say(f"{time.monotonic() - began:4.0f} s  raymuon {' '.join(arguments[:2])}")
        return found

    def train(self, config: str, name: str, *changes: str) -> dict[str, Any]:
        """Train a run of a name."""
        places = [f"tracking.uri={self.uri}", f"checkpoint.url={self.folder}/checkpoints"]
        places += [f"data.prepared_url={self.folder}/data", f"data.tokenizer={self.folder}/tokenizer"]
        return self.told("train", config, f"run.name={name}", f"model.vocab_size={VOCAB}", *places, *changes)

    def run(self, name: str) -> list[str]:
        """Return the arguments by which a command finds a run."""
        return [name, "--tracking-uri", self.uri]


def moonlight(folder: Path, seeds: int, say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Do all of it.

    Args:
        folder: a new one, for everything.
        seeds: of each fine-tuning.
        say: takes a line about each part.
        quick: a twentieth of the steps: to see that it works.

    Returns:
        The figures.

    Raises:
        ConfigError: the folder is not empty.
        TrainingError: a part failed, or transformers writes something else than we do.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: something is there already; name a new folder")
    began, place = time.monotonic(), Place(folder, say)
    most = ["--most-mb", "1"] if quick else []
    place.told("tokenizer", "train", "python-stdlib", "--vocab", str(VOCAB), "--to", f"{folder}/tokenizer", *most)
    pretrained = {name: _pretrain(place, name, quick) for name in PEAKS}
    tuned = {
        (before, after): [_fine_tune(place, before, after, seed, quick) for seed in range(seeds)]
        for before in PEAKS
        for after in TUNING
    }
    evaluated = {name: _evaluate(place, name, quick) for name in (*PEAKS, *(_name(*pair, 0) for pair in tuned))}
    spectra = place.told(
        "study", "spectrum", *PEAKS, "--series", "--out", f"{folder}/spectra", "--tracking-uri", place.uri
    )
    return {
        "pretrained": {name: _figures(run) for name, run in pretrained.items()},
        "recoveries": pretrained["muon"]["recoveries"],
        "fine_tuned": {" then ".join(pair): [run["val_loss"] for run in runs] for pair, runs in tuned.items()},
        "before_fine_tuning": {pair[0]: runs[0]["val_loss_start"] for pair, runs in tuned.items()},
        "evaluated": evaluated,
        "spectra": spectra["differences"],
        "written": _export(place, "muon", pretrained["muon"]["checkpoint"]),
        "seconds": time.monotonic() - began,
    }


def _pretrain(place: Place, optimizer: str, quick: bool) -> dict[str, Any]:
    """Train `moonlight-demo`, its rates in proportion to the optimizer's peak; Muon's run loses a worker."""
    stages, scale = load("moonlight-demo", []).train.stages, PEAKS[optimizer] / PEAKS["muon"]
    changes = [f"optim.name={optimizer}", "checkpoint.keep_last=0"]
    for number, stage in enumerate(stages):
        for key, rate in (("lr", stage.lr), ("final_lr", stage.final_lr)):
            if rate > 0:
                changes.append(f"train.stages.{number}.{key}={rate * scale}")
        if quick:
            changes.append(f"train.stages.{number}.steps={max(4, stage.steps // 20)}")
            changes.append(f"train.stages.{number}.warmup_steps={min(2, stage.warmup_steps)}")
    steps = sum(max(4, stage.steps // 20) if quick else stage.steps for stage in stages)
    kill = ["--kill-worker", str(steps // 2)] if optimizer == "muon" else []
    return place.train("moonlight-demo", optimizer, *changes, *kill)


def _name(before: str, after: str, seed: int) -> str:
    return f"{before}-{after}-{seed}"


def _fine_tune(place: Place, before: str, after: str, seed: int, quick: bool) -> dict[str, Any]:
    changes = [f"optim.name={after}", f"optim.lr={TUNING[after]}", f"seed={seed}", f"train.init={before}"]
    changes += ["data.chat_template=plain", "checkpoint.every=0", "train.global_batch=8", "optim.warmup_steps=4"]
    changes.append(f"train.steps={8 if quick else 40}")
    return place.train("demo-chat", _name(before, after, seed), *changes)


def _evaluate(place: Place, name: str, quick: bool) -> dict[str, float]:
    """Return the figures of a run's newest checkpoint by task and metric; of a pretrained one's all are on record."""
    extra = ["--series"] if name in PEAKS else []
    extra += ["--limit", "16"] if quick else []
    found = place.told("evaluate", *place.run(name), "--tasks", TASKS, *extra)
    return {f"{one['task']} {one['metric']}": one["value"] for one in found["checkpoints"][-1]["figures"]}


def _export(place: Place, name: str, checkpoint: str) -> str:
    """Export a run's checkpoint, and return what both transformers and we write on from a prompt.

    Raises:
        TrainingError: that is not the same.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to = f"{place.folder}/exported"
    place.told("export", checkpoint, "--to", to, "--dtype", "float32")
    ours = place.told("generate", *place.run(name), "--prompt", PROMPT, "--tokens", str(WRITTEN))
    model: Any = AutoModelForCausalLM.from_pretrained(to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = model.generate(prompt, max_new_tokens=WRITTEN, do_sample=False)[0, prompt.shape[1] :]
    theirs = tokenizer.decode(written, skip_special_tokens=True)
    if theirs != ours["text"]:
        raise TrainingError(f"transformers writes {theirs!r} with the export, raymuon {ours['text']!r}")
    return PROMPT + theirs


def _figures(run: dict[str, Any]) -> dict[str, float]:
    return {key: run[key] for key in ("val_loss", "val_bits_per_byte", "steps", "wall_s")}


def report(found: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    lines = ["| pretrained with | validation loss, nats per token | bits per byte |", "| --- | --- | --- |"]
    for name, run in found["pretrained"].items():
        lines.append(f"| {name} | {run['val_loss']:.4f} | {run['val_bits_per_byte']:.4f} |")
    lines += ["", "| pretrained | before | " + " | ".join(f"fine-tuned with {name}" for name in TUNING) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(TUNING))
    for before in PEAKS:
        cells = [_spread(found["fine_tuned"][f"{before} then {after}"]) for after in TUNING]
        lines.append(f"| {before} | {found['before_fine_tuning'][before]:.4f} | " + " | ".join(cells) + " |")
    metrics = list(next(iter(found["evaluated"].values())))
    lines += ["", "| model | " + " | ".join(metrics) + " |", "| --- |" + " --- |" * len(metrics)]
    for name, figures in found["evaluated"].items():
        lines.append(f"| {name} | " + " | ".join(f"{figures[metric]:.4f}" for metric in metrics) + " |")
    lines += ["", "| group | entropy, Muon over AdamW | higher in |", "| --- | --- | --- |"]
    for group, one in found["spectra"][0]["groups"].items():
        lines.append(f"| {group} | {one['entropy']:+.4f} | {one['higher']} of {one['pairs']} |")
    return "\n".join(lines) + "\n"


def _spread(losses: list[float]) -> str:
    return f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else "")
