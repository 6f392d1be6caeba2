"""`raymuon train`: a run from config to summary."""

import importlib
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from jobs.origin import with_checkpoint
from jobs.prepare import prepared
from jobs.screen import Screen, command, mlflow_page
from jobs.settings import Configured
from jobs.tell import tell
from jobs.watch import TerminalWatcher
from orchestrator.config import RunConfig, absolute
from orchestrator.driver import Options, run
from orchestrator.generation import Decide
from orchestrator.group.cluster import JOB_VARIABLE, is_local
from orchestrator.group.usage import memory_here
from orchestrator.origin import find_origin
from orchestrator.preflight import in_background
from orchestrator.record.result import RunResult
from orchestrator.stop import StopSignal
from workers.common.errors import ConfigError
from workers.common.storage import storage_errors
from workers.recipe import TrainConfig


def train(
    found: Configured,
    given: Sequence[str],
    resume: str,
    address: str | None,
    stop: StopSignal,
    as_json: bool,
    kill_worker: int | None = None,
    take_over: bool = False,
    look: bool = True,
) -> None:
    """Train, then say what came out of it; with `as_json` as one JSON object on the last line of stdout.

    Args:
        found: the config of the run.
        given: the arguments that it is from, for commands that can be pasted.
        resume: see `run`.
        address: see `run`.
        stop: tells when a person wants it to end.
        as_json: see above.
        kill_worker: for demonstrations: SIGKILL one after this step.
        take_over: take the run from a driver that leads it.
        look: refuse what does not fit into this machine.

    Raises:
        RaymuonError: with its exit code; Interrupted after a clean stop, too, with the way on.
    """
    run_config = found.config
    if kill_worker is not None:
        _check_kill(kill_worker, run_config)
    plots: list[Path | None] = []
    options = Options(
        artifacts=lambda result, record: plots.append(_keep_curve(run_config, result, record)),
        tags=found.tags,
        take_over=take_over,
        kill_after=kill_worker,
        decide=_decider(),
        meanwhile=_plan,
    )
    with TerminalWatcher() as watcher:
        for warning in found.warnings:
            watcher.warn(warning)
        run_config = _begun(run_config, resume, stop, watcher)
        options = replace(options, files={"config.yaml": replace(found, config=run_config).yaml().encode()})
        for left_out in run_config.recipe.cut_short():
            watcher.warn(left_out)
        looked: Future[None] = Future()
        if look and is_local(address):
            free = memory_here()[1]  # Before anything of the run takes some.
            looked = in_background(partial(_look, run_config, free, watcher), may_be_torn=True)
        else:
            looked.set_result(None)
        corpora = prepared(run_config, address, stop, watcher.console, before=looked.result)
        options = replace(options, corpora=corpora, looked=looked)
        result = run(run_config, resume, address, watcher, stop, options)
    summary = _summary(run_config, result, plots[0] if plots else None)
    console = Screen(stderr=as_json)
    _print(summary, console)
    if result.status == "finished" and JOB_VARIABLE not in os.environ:
        again = ["--address", address] if address else []
        _print_what_next(console, [*given, *again], run_config, result)
    if as_json:
        tell(summary)
    if result.status == "interrupted":
        saved = "with a checkpoint" if result.checkpoint else "before the first checkpoint"
        raise stop.interrupted(f"stopped at step {result.steps} {saved}")


def _begun(config: RunConfig, resume: str, stop: StopSignal, watcher: TerminalWatcher) -> RunConfig:
    """Return the config, its paths absolute, with a checkpoint as `train.init`: looked at before data are prepared.

    A run that goes on may need none any more.
    """
    try:
        with stop.abruptly():
            begun = absolute(with_checkpoint(config, lambda text: watcher.console.print(text, style="dim")))
            if resume == "never":
                find_origin(begun)
            return begun
    except ConfigError as error:
        if resume == "never":
            raise
        watcher.warn(f"{error}; a run that goes on from a checkpoint of its own does without")
        return absolute(config)


def _decider() -> Decide:
    """Return what decides by the plan, whose modules import torch: not before they are needed."""
    deciders: list[Decide] = []

    def decide(config: RunConfig, nodes: Sequence[str], devices: Sequence[str]) -> TrainConfig:
        if not deciders:
            deciders.append(_plan().Decider())
        return deciders[0](config, nodes, devices)

    return decide


def _plan() -> Any:
    return importlib.import_module("jobs.planning.choice")


def _check_kill(step: int, config: RunConfig) -> None:
    if step >= config.train.steps:
        raise ConfigError(f"--kill-worker {step}: must be less than train.steps={config.train.steps}")
    if config.scaling.max_workers < 2:
        raise ConfigError(f"--kill-worker {step}: needs scaling.max_workers=2 or more, so that somebody goes on")


def _look(config: RunConfig, free: int, watcher: TerminalWatcher) -> None:
    """Say what the run needs and what this machine has; refuse what clearly does not fit."""
    from jobs.planning.here import look_here, workers_here  # Imports torch.

    try:
        told = look_here(config, workers_here(config), free, watcher.warn)
    except ConfigError as error:
        raise ConfigError(f"{error}\n  this is an estimate: --no-look starts the run all the same") from error
    watcher.console.print(told, style="dim")


def _keep_curve(config: RunConfig, result: RunResult, record: Any) -> Path | None:
    """Put the loss curve into the MLflow run, and keep it under runs/plots too, unless this is a job."""
    from jobs.curves import plot_losses  # matplotlib takes a second to import.

    kept = Path("runs") / "plots" / f"{result.run_id}.png"
    # A full disk here, or in the temporary folder, must not look like a failed training.
    with storage_errors(str(kept)), tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "loss.png"
        plot_losses({config.run.name: result.losses}, picture, result.changes)
        record.artifact(picture)
        if JOB_VARIABLE in os.environ:
            return None  # A job's working directory goes with it.
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(picture.read_bytes())
    return kept.resolve()


def _summary(config: RunConfig, result: RunResult, plot: Path | None) -> dict[str, Any]:
    started = psutil.Process(os.getpid()).create_time()
    kept = {key: value for key, value in asdict(result).items() if key not in ("losses", "first_step")}
    return {
        **kept,
        "changes": [change.record() for change in result.changes],
        "loss_curve": plot and str(plot),
        "mlflow_tracking_uri": config.tracking.uri,
        "wall_s": round(time.time() - started, 2),
        "first_step_s": round(sum(result.first_step.values()), 2) if result.first_step else None,
        "first_step_parts": {part: round(seconds, 3) for part, seconds in result.first_step.items()},
    }


def _print(summary: dict[str, Any], console: Screen) -> None:
    console.print(f"\n{summary['status']} at step {summary['steps']} after {summary['tokens']:,} tokens", style="bold")
    survived = f"; {summary['recoveries']} fault(s) survived" if summary["recoveries"] else ""
    mean = f", {summary['mttr_s']:.2f} s on average from a fault to the next new step" if survived else ""
    console.print(f"goodput {summary['goodput']:.1%}{survived}{mean}")
    last = "end" if summary["status"] == "finished" else "last time"
    for when, suffix in (("start", "_start"), (last, "")):
        if (loss := summary[f"val_loss{suffix}"]) is not None:
            bits = summary[f"val_bits_per_byte{suffix}"]
            console.print(f"validation at the {when}: {loss:.4f} nats, {bits:.4f} bits per byte")
    if summary["sample"]:
        console.print("sample:")
        console.print("\n".join(f"    {line}" for line in summary["sample"].splitlines()))
    if summary["loss_curve"]:
        console.print(f"loss curve: {summary['loss_curve']}")
    console.print(f"checkpoint: {summary['checkpoint']}")
    console.print(f"MLflow:     {mlflow_page(summary['mlflow_tracking_uri'], summary['page'])}")


def _print_what_next(console: Screen, arguments: list[str], config: RunConfig, result: RunResult) -> None:
    """Print commands that can be pasted: further with this run, its model, and a run on other text."""
    kept = [argument for argument in arguments if not argument.startswith(("train.steps=", "train.tokens="))]
    further = [*kept, "--resume", result.run_id, f"train.steps={2 * config.train.steps}"]
    model = ["export", result.checkpoint, "--to", f"runs/exports/{result.run_id}-{result.steps}"]
    console.print("\nwhat next:")
    if not (config.train.stages or config.train.tokens):  # Their lengths are in a file.
        console.print(f"  train it further     {command('raymuon', 'train', *further)}")
    console.print(f"  export the model     {command('raymuon', *model)}")
    if not (config.data.chats or config.data.sources):
        own = [argument for argument in arguments if not argument.startswith(("run.name=", "data.source="))]
        console.print(f"  this folder's text   {command('raymuon', 'train', *own, 'run.name=mine', 'data.source=.')}")
