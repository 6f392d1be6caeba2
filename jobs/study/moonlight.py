"""`raymuon study moonlight`: what the Moonlight paper did, at the demo's size, from text to table, on one machine.

A tokenizer of one's own text; two pretrainings in stages, by Muon and by AdamW, the first of which loses a worker; both
fine-tuned by both optimizers, from several seeds; evaluation, spectra, an export and what transformers writes with it.
Each part is a command that a person would give, in a process of its own. What it has told is kept once it is done, so
that a study which was interrupted goes on; it goes on with nothing that was made otherwise.
"""

import fcntl
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jobs.bench.process import raymuon, run_json
from jobs.load import load
from jobs.tell import json_text
from workers.common.errors import ConfigError, TrainingError
from workers.common.source import training_code
from workers.common.storage import Store

VOCAB = 1024
PEAKS = {"muon": 1.6e-2, "adamw": 3e-3}
"""Of the pretrainings: each optimizer's best of three on the demo (docs/benchmarks.md)."""
TUNING = {"muon": 4e-3, "adamw": 1e-3}
"""Peaks of the fine-tunings."""
TASKS = "stdlib"
PROMPT, WRITTEN = "def main(", 64
MARK = "study.json"
"""Says what a folder is of; parts/ beside it has what each part that is done has told."""


@dataclass(frozen=True)
class Place:
    """Where all of it is kept, and who is told how far it is."""

    folder: Path
    say: Callable[[str], object]
    quick: bool
    """A twentieth of the steps."""

    @property
    def store(self) -> Store:
        """The folder."""
        return Store(str(self.folder))

    @property
    def uri(self) -> str:
        """MLflow's."""
        return f"sqlite:///{self.folder}/mlflow.db"

    def told(self, part: str, *arguments: str, makes: str = "") -> Any:
        """Run a command, and return what it tells; of a part that is done what it has told.

        Args:
            part: its name.
            arguments: the command's.
            makes: a folder that the command wants new; what an interrupted one has left in it goes.

        Raises:
            RaymuonError: it failed.
        """
        kept = f"parts/{part}.json"
        if self.store.exists(kept):
            return json.loads(self.store.read(kept))["told"]
        if makes:
            shutil.rmtree(self.folder / makes, ignore_errors=True)
        began = time.monotonic()
        # Its own Ray and its own MLflow, whatever the person's environment names.
        environment = {"RAY_ADDRESS": "local", "MLFLOW_TRACKING_URI": self.uri}
        found = run_json(raymuon(*arguments, "--json"), self.folder, **environment)
        seconds = time.monotonic() - began
        self.store.put(kept, json_text({"seconds": seconds, "arguments": arguments, "told": found}).encode())
        self.say(f"{seconds:4.0f} s  {part}")
        return found

    def train(self, part: str, config: str, name: str, *changes: str) -> dict[str, Any]:
        """Train a run of a name, or go on with it."""
        places = [f"tracking.uri={self.uri}", f"checkpoint.url={self.folder}/checkpoints"]
        places += [f"data.prepared_url={self.folder}/data", f"data.tokenizer={self.folder}/tokenizer"]
        fixed = [f"run.name={name}", f"model.vocab_size={VOCAB}", *places]
        return self.told(part, "train", config, "--resume", "auto", *fixed, *changes)

    def seconds(self) -> float:
        """Return how long all parts took."""
        parts = self.store.read_all([f"parts/{name}" for name in self.store.names("parts")])
        return sum(json.loads(part)["seconds"] for part in parts)


def moonlight(folder: Path, seeds: int, say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Do all of it, or what is left of it.

    Args:
        folder: for everything: a new one, or that of a study which was interrupted.
        seeds: of each fine-tuning.
        say: takes a line about each part.
        quick: a twentieth of the steps: to see that it works.

    Returns:
        The figures.

    Raises:
        RaymuonError: something else is in the folder, or a part failed.
        TrainingError: transformers writes something else than we do.
    """
    for package, how in (("lm_eval", "'raymuon[eval]'"), ("transformers", "transformers")):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} is not installed, and the study needs it at its end: pip install {how}")
    place = Place(folder, say, quick)
    with _alone(place):
        most = ["--most-mb", "1"] if quick else []
        to = f"{folder}/tokenizer"
        text = ["python-stdlib", "--vocab", str(VOCAB), "--to", to, *most]
        place.told("tokenizer", "tokenizer", "train", *text, makes="tokenizer")
        pretrained = {name: _pretrain(place, name) for name in PEAKS}
        tuned = {
            (before, after): [_fine_tune(place, before, after, seed) for seed in range(seeds)]
            for before in PEAKS
            for after in TUNING
        }
        evaluated = {name: _evaluate(place, name) for name in (*PEAKS, *(_name(*pair, 0) for pair in tuned))}
        spectra = place.told(
            "spectra", "study", "spectrum", *PEAKS, "--series", "--out", f"{folder}/spectra", makes="spectra"
        )
        found = {
            "pretrained": {name: _figures(run) for name, run in pretrained.items()},
            "recoveries": pretrained["muon"]["recoveries"],
            "fine_tuned": {" then ".join(pair): [run["val_loss"] for run in runs] for pair, runs in tuned.items()},
            "before_fine_tuning": {pair[0]: runs[0]["val_loss_start"] for pair, runs in tuned.items()},
            "evaluated": evaluated,
            "spectra": spectra["differences"],
            "written": _export(place, "muon", pretrained["muon"]["checkpoint"]),
            "seconds": place.seconds(),
        }
        place.store.put("report.md", report(found).encode())
    return found


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Begin in the folder, or go on there, as the only one.

    Raises:
        ConfigError: it is of something else, or another process is at work in it.
        StorageError: it cannot be made.
    """
    out, study = f"--out {place.folder}", {"quick": place.quick, "code": training_code()}
    found = place.store.names("")
    if found and MARK not in found:
        raise ConfigError(f"{out}: something is there already that is no study; name a new folder")
    if not found:
        place.store.put(MARK, json.dumps(study).encode())
    known = json.loads(place.store.read(MARK))
    if differ := [key for key in study if study[key] != known.get(key)]:
        raise ConfigError(f"{out}: a study with another {' and '.join(differ)} is there; name a new folder")
    if found:
        place.say(f"going on in {place.folder}: {len(place.store.names('parts'))} part(s) are done")
    with (place.folder / MARK).open() as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another process is at work in it") from None
        yield


def _pretrain(place: Place, optimizer: str) -> dict[str, Any]:
    """Train `moonlight-demo`, its rates in proportion to the optimizer's peak; Muon's run loses a worker."""
    stages, scale = load("moonlight-demo", []).train.stages, PEAKS[optimizer] / PEAKS["muon"]
    changes = [f"optim.name={optimizer}", "checkpoint.keep_last=0"]
    steps = [max(4, stage.steps // 20) if place.quick else stage.steps for stage in stages]
    for number, stage in enumerate(stages):
        at = f"train.stages.{number}"
        changes += [f"{at}.{key}={rate * scale}" for key in ("lr", "final_lr") if (rate := getattr(stage, key)) > 0]
        if place.quick:
            changes += [f"{at}.steps={steps[number]}", f"{at}.warmup_steps={min(2, stage.warmup_steps)}"]
    kill = ["--kill-worker", str(sum(steps) // 2)] if optimizer == "muon" else []
    return place.train(f"pretrain-{optimizer}", "moonlight-demo", optimizer, *changes, *kill)


def _name(before: str, after: str, seed: int) -> str:
    return f"{before}-{after}-{seed}"


def _fine_tune(place: Place, before: str, after: str, seed: int) -> dict[str, Any]:
    """Fine-tune a pretrained one on conversations, with sequences as it knows them: it is evaluated with these."""
    changes = [f"optim.name={after}", f"optim.lr={TUNING[after]}", f"seed={seed}", f"train.init={before}"]
    changes += ["data.chat_template=plain", "checkpoint.every=0", "optim.warmup_steps=4"]
    changes += ["train.seq_len=256", "train.global_batch=16", "train.validate_sequences=128"]  # All that there are.
    changes.append(f"train.steps={8 if place.quick else 40}")
    name = _name(before, after, seed)
    return place.train(f"fine-tune-{name}", "demo-chat", name, *changes)


def _evaluate(place: Place, name: str) -> dict[str, float]:
    """Return the figures of a run's newest checkpoint by task and metric; of a pretrained one's all are on record."""
    extra = ["--series"] if name in PEAKS else []
    extra += ["--limit", "16"] if place.quick else []
    found = place.told(f"evaluate-{name}", "evaluate", name, "--tasks", TASKS, *extra)
    return {f"{one['task']} {one['metric']}": one["value"] for one in found["checkpoints"][-1]["figures"]}


def _export(place: Place, name: str, checkpoint: str) -> str:
    """Export a run's checkpoint, and return what both transformers and we write on from a prompt.

    Raises:
        TrainingError: that is not the same.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to = f"{place.folder}/exported"
    place.told("export", "export", checkpoint, "--to", to, "--dtype", "float32", makes="exported")
    ours = place.told("generate", "generate", name, "--prompt", PROMPT, "--tokens", str(WRITTEN))
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
