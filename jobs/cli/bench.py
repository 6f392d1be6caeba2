"""`raymuon bench`: measurements, as ratios where there is a rival."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli.options import AsJson, Overrides, S3Endpoint, writable
from jobs.tell import json_text, tell

app = typer.Typer()
bench_app = typer.Typer(no_args_is_help=True, help="Measurements against rivals, as ratios.")
app.add_typer(bench_app, name="bench")


@bench_app.command("overhead")
def bench_overhead(
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of all arms.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of raymuon against plain torchrun with the same engine, in turns."""
    from jobs.bench.overhead import overhead

    _print_result(overhead(overrides or [], repeats, _say), as_json)


@bench_app.command("recovery")
def bench_recovery(
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of each fault with raymuon.")] = 5,
    rival_repeats: Annotated[int, typer.Option(min=0, help="Of each fault with Ray Train; 0: without it.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Seconds from a fault to the next new step, against Ray Train V2 with the same engine, model and data."""
    from jobs.bench.recovery import recovery

    _print_result(recovery(overrides or [], repeats, rival_repeats, _say), as_json)


@bench_app.command("checkpoint")
def bench_checkpoint(
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Saves and uploads of each kind.")] = 7,
    url: Annotated[str, typer.Option(help="A folder on S3; without it a SeaweedFS is started.")] = "",
    s3_endpoint: S3Endpoint = "",
    as_json: AsJson = False,
) -> None:
    """What a save costs training against DeepSpeed's, its way to S3 against s3fs, and what another world size reads."""
    from jobs.bench.checkpoint import checkpoint

    _print_result(checkpoint(overrides or [], repeats, url, s3_endpoint, _say), as_json)


@bench_app.command("optimizer")
def bench_optimizer(
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Counted steps of each optimizer.")] = 15,
    as_json: AsJson = False,
) -> None:
    """Milliseconds of a step that the optimizer takes, against DeepSpeed's Muon, AdamW and the bare products."""
    from jobs.bench.optimizer import optimizer

    _print_result(optimizer(overrides or [], rounds, _say), as_json)


@bench_app.command("model")
def bench_model(
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Counted steps of each model.")] = 15,
    only: Annotated[str, typer.Option(help="One config by name; without it both.")] = "",
    as_json: AsJson = False,
) -> None:
    """Tokens per second of a training step against transformers' models, plain and compiled."""
    from jobs.bench.model import model

    _print_result(model(overrides or [], rounds, only, _say), as_json)


@bench_app.command("generate")
def bench_generate(
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option(min=1, help="Timed at each length, with a cache.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Milliseconds of a generated token behind 100, 1,000 and 4,000 others, with a cache and without."""
    from jobs.bench.generate import generate

    _print_result(generate(overrides or [], tokens, _say), as_json)


@bench_app.command("accumulation")
def bench_accumulation(
    overrides: Overrides = None,
    count: Annotated[
        list[int] | None, typer.Option(min=8, help="Micro-batches that are added up; a multiple of 8. Several times.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How exact a step's sum of gradients is in bf16, in fp32 and in parts, against fp64."""
    from jobs.bench.accumulation import accumulation

    _print_result(accumulation(overrides or [], count or [32, 256], _say), as_json)


@bench_app.command("gpu")
def bench_gpu(
    tiny: Annotated[bool, typer.Option("--tiny", help="Small, on the CPU; so without a GPU.")] = False,
    only: Annotated[str, typer.Option(help="One part by name; without it all of them.")] = "",
    table: Annotated[Path | None, typer.Option(callback=writable, help="Where a Markdown table goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """What kernels and choices gain on one GPU at Moonlight-16B's width, and how far the plan is from it."""
    from jobs.bench.gpu import gpu, markdown, show

    result = gpu(tiny, only, _say)
    if table is not None:
        table.write_text(markdown(result))
    if as_json:
        tell(result)
    else:
        show(result)


@bench_app.command("plan")
def bench_plan(
    overrides: Overrides = None,
    turns: Annotated[int, typer.Option(min=1, help="Of calibration and steps, for each config and world size.")] = 3,
    only: Annotated[str, typer.Option(help="One config by name; without it all of them.")] = "",
    memory: Annotated[bool, typer.Option("--memory", help="Peaks alone, with each way to save memory.")] = False,
    as_json: AsJson = False,
) -> None:
    """The plan's memory and step time against what a run takes on this machine."""
    if memory:
        from jobs.bench.plan_memory import memory_against_reality

        _print_result(memory_against_reality(overrides or [], only, _say), as_json)
        return
    from jobs.bench.plan import against_reality

    _print_result(against_reality(overrides or [], turns, only, _say), as_json)


@bench_app.command("data")
def bench_data(
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each comparison.")] = 5,
    vocab: Annotated[int, typer.Option(min=257, help="Tokens of the tokenizer.")] = 32_000,
    as_json: AsJson = False,
) -> None:
    """How fast text becomes tokens, against tokenizers, and tokens reach a worker, against what a core eats."""
    from jobs.bench.data import data

    _print_result(data(overrides or [], rounds, vocab, _say), as_json)


@bench_app.command("load")
def bench_load(
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=100, help="Of the simulated members.")] = 10_000,
    workers: Annotated[int, typer.Option(min=2, help="Simulated members.")] = 1024,
    actors: Annotated[int, typer.Option(min=0, help="Real ones on a local Ray; 0: without them.")] = 16,
    as_json: AsJson = False,
) -> None:
    """What the driver bears: steps per second of a thousand simulated workers, and what real ones cost it."""
    from jobs.bench.driver_load import driver_load

    _print_result(driver_load(overrides or [], steps, workers, actors, _say), as_json)


@bench_app.command("study")
def bench_study(
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=2, help="An even number.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Of each trial.")] = 600,
    slots: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Wall time of a study of equal short trials, over the time that their steps alone would take."""
    from jobs.bench.study import study

    _print_result(study(overrides or [], trials, steps, slots, _say), as_json)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        tell(result)
    else:
        typer.echo(json_text(result, indent=2))
