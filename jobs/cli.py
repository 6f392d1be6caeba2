"""The command `raymuon`. Every error that a person can mend is one message and an exit code, never a traceback.

Exit codes: 0 ok, 2 config, 3 cluster, 4 training, 5 storage or tracking, 130 interrupted.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from orchestrator.config import DEFAULT_TRACKING_URI
from workers.errors import RaymuonError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
checkpoints_app = typer.Typer(no_args_is_help=True, help="List, show, compare, verify, delete and pin checkpoints.")
app.add_typer(checkpoints_app, name="checkpoints")
bench_app = typer.Typer(no_args_is_help=True, help="Measurements against rivals, as ratios.")
app.add_typer(bench_app, name="bench")


def _configure_s3(endpoint: str) -> str:
    from workers.storage import configure_s3

    configure_s3(endpoint)
    return endpoint


S3Endpoint = Annotated[str, typer.Option(help="Of an S3 store that is not AWS.", callback=_configure_s3)]
Config = Annotated[str, typer.Argument(help="A YAML file, or a built-in config by name: demo.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for instance optim.lr=1e-2.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on the last line of stdout.")]
Run = Annotated[str, typer.Argument(help="A run's id or name in MLflow, or the URL of its folder.")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="Of the MLflow that has the run.")]
RunEndpoint = Annotated[str, typer.Option("--s3-endpoint", help="Of an S3 store that is not AWS; else the run's own.")]
DEFAULT_HEAD = "http://127.0.0.1:8265"
Head = Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard.")]
JobHead = Annotated[str, typer.Option("--address", help="URL of the cluster's dashboard; else where it was submitted.")]
Follow = Annotated[bool, typer.Option("--follow", help="Hand on what the job writes, until it ends.")]
ClientTracking = Annotated[
    str, typer.Option("--tracking-uri", help="The config's tracking.uri as this machine reaches it, if that differs.")
]
Image = Annotated[str, typer.Option(help="Container image for the job, where the nodes can start one.")]
Pin = Annotated[bool, typer.Option("--pin", help="Have the nodes install this machine's versions of everything.")]
AllowOpen = Annotated[bool, typer.Option("--allow-open-head", help="Use a head that asks nobody for a token.")]
GpuType = Annotated[str, typer.Option(help="A GPU of the table in docs/commands/plan.md, for instance H100.")]
CalibrationFile = Annotated[
    Path | None, typer.Option(help="What raymuon doctor --calibration has measured, in the place of --gpu-type.")
]
CheckpointUrl = Annotated[str, typer.Argument(help="A run's folder, its newest checkpoint, or FOLDER@STEP.")]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: go on with the unfinished run of that name; RUN: with that one; never: a new run."),
    ] = "never",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; RAY_ADDRESS also counts. None: a local Ray.")
    ] = None,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="With --resume: take the run from a driver that leads it.")
    ] = False,
    as_json: AsJson = False,
    kill_worker: Annotated[
        int | None, typer.Option(help="For demonstrations: SIGKILL one worker after this step.")
    ] = None,
) -> None:
    """Train a run from its start, or go on with one."""
    from jobs.train import train

    train(config, overrides or [], resume, address, as_json, kill_worker, takeover)


@app.command()
def replay(
    run: Run,
    overrides: Overrides = None,
    steps: Annotated[
        str, typer.Option(help="A:B; without A from the newest checkpoint before B, without B to the last on record.")
    ] = "",
    workers: Annotated[int | None, typer.Option(min=1, help="As many as the run had, where it is not given.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative difference of a loss that is borne; ten times that of a norm.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; RAY_ADDRESS also counts. None: a local Ray.")
    ] = None,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    s3_endpoint: RunEndpoint = "",
    as_json: AsJson = False,
) -> None:
    """Train a stretch of a run once more, and compare losses and gradient norms with its record."""
    from jobs.replay import Request, replay

    request = Request(run, steps, tracking_uri, s3_endpoint, address, workers, tolerance, tuple(overrides or []))
    replay(request, as_json)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Head = DEFAULT_HEAD,
    follow: Follow = False,
    tracking_uri: ClientTracking = "",
    image: Image = "",
    pin: Pin = False,
    gpu_type: GpuType = "",
    calibration: CalibrationFile = None,
    allow_open_head: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """Plan a new run, and submit it as a job to a Ray cluster."""
    from jobs.submit import Target, submit

    target = Target(
        address=address,
        tracking_uri=tracking_uri,
        image=image,
        pin=pin,
        allow_open=allow_open_head,
        gpu_type=gpu_type,
        calibration=calibration,
    )
    submit(config, overrides or [], target, follow, as_json)


@app.command()
def resume(
    run: Run,
    overrides: Overrides = None,
    address: Head = DEFAULT_HEAD,
    follow: Follow = False,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    image: Image = "",
    pin: Pin = False,
    allow_open_head: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job that goes on with a run."""
    from jobs.runs import find
    from jobs.submit import Target, resume

    target = Target(address=address, image=image, pin=pin, allow_open=allow_open_head)
    resume(find(run, tracking_uri), overrides or [], target, follow, as_json)


@app.command()
def status(
    run: Run,
    address: JobHead = "",
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    allow_open_head: AllowOpen = False,
    as_json: AsJson = False,
    s3_endpoint: RunEndpoint = "",
) -> None:
    """Show where a run is: step, losses, workers, checkpoint, job."""
    from jobs.control import status
    from jobs.runs import find

    status(find(run, tracking_uri, s3_endpoint), address, allow_open_head, as_json)


@app.command()
def logs(
    run: Run,
    follow: Follow = False,
    address: JobHead = "",
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    allow_open_head: AllowOpen = False,
) -> None:
    """Print the log of a run's newest job."""
    from jobs.control import logs
    from jobs.runs import find

    logs(find(run, tracking_uri), address, allow_open_head, follow)


@app.command()
def stop(
    run: Run,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for its end.")] = 600.0,
    address: JobHead = "",
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    allow_open_head: AllowOpen = False,
) -> None:
    """Ask a run's job to finish its step, save and end; it can go on later."""
    from jobs.control import stop
    from jobs.runs import find

    stop(find(run, tracking_uri), address, allow_open_head, wait)


@app.command()
def stack(
    folder: Annotated[str, typer.Option(help="For all its files; what is there is gone on with.")] = "runs/stack",
    nodes: Annotated[int, typer.Option(min=1, help="Of Ray, beside the head.")] = 2,
    gpus: Annotated[int, typer.Option(min=0, help="Logical GPUs of each node.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processors of each node, as Ray counts.")] = 1,
) -> None:
    """Run Ray with several nodes, MLflow and S3 on this machine until Ctrl-C, without containers."""
    from jobs.stack.local import stack

    stack(folder, nodes, gpus, workers, "demo")


@app.command()
def export(
    url: CheckpointUrl,
    to: Annotated[str, typer.Option(help="A new folder, or an fsspec URL.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16 or float32.")] = "bfloat16",
    series: Annotated[bool, typer.Option("--series", help="All checkpoints, each in a folder of its own.")] = False,
    register: Annotated[str, typer.Option(help="Make it a version of this model in MLflow's registry.")] = "",
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Write a checkpoint as a Hugging Face model: safetensors, config, tokenizer, model card."""
    from jobs.export import export, export_series
    from jobs.export import register as register_
    from workers.errors import ConfigError

    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"--dtype must be bfloat16 or float32, not {dtype!r}")
    exported = export_series(url, to, dtype) if series else [export(url, to, dtype)]
    for one in exported:
        line = f"step {one.step}: {len(one.files)} file(s), {one.bytes / 1e6:.1f} MB in {one.url}"
        told = asdict(one)
        if register:
            told["version"] = register_(one, register, tracking_uri)
            line += f", version {told['version']} of {register}"
        typer.echo(json.dumps(told) if as_json else line)


@app.command(name="import")
def import_(
    folder: Annotated[str, typer.Argument(help="With config.json and *.safetensors, of DeepSeek-V3 or Llama.")],
    to: Annotated[str, typer.Option(help="A new folder, or an fsspec URL.")],
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Make a Hugging Face model a checkpoint with which a run can begin: train.init=URL."""
    from jobs.import_ import import_model

    url = import_model(folder, to)
    typer.echo(f"imported; begin a run with it: train.init={url}")


@app.command(name="config")
def config_(config: Config = "demo", overrides: Overrides = None) -> None:
    """Print a config with all its keys, resolved and documented."""
    from jobs.load import documented_yaml, load

    typer.echo(documented_yaml(load(config, overrides or [])))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, help="Data-parallel ranks; may be given several times.")
    ] = None,
    gpu_type: GpuType = "",
    calibration: CalibrationFile = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="That share a node's memory and network.")] = 8,
    network: Annotated[float, typer.Option(help="Gbit/s of a node, with --gpu-type.")] = 400.0,
    price: Annotated[float | None, typer.Option(help="Money per GPU-hour, of any currency.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="To train on, in the place of train.steps.")] = None,
    mtbf: Annotated[
        float | None, typer.Option(help="Mean hours between failures of one GPU with its share of a node.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run needs before it is started: memory, traffic, time, money; refuse what cannot fit."""
    from jobs.load import load
    from jobs.planning.command import show

    loaded = load(config, overrides or [])
    show(loaded, gpus or [], gpu_type, calibration, gpus_per_node, network, price, tokens, mtbf, as_json)


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="Of the run that is meant to start. None: the cluster alone.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; RAY_ADDRESS also counts. None: a local Ray.")
    ] = None,
    storage: Annotated[str, typer.Option(help="Folder (fsspec URL) to check in checkpoint.url's place.")] = "",
    calibration: Annotated[
        Path | None, typer.Option(help="Write what was measured for `raymuon plan --calibration`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a cluster, storage and tracking before money is spent: exit code 3 or 5 where something would fail."""
    from jobs.doctor import doctor

    if code := doctor(config, overrides or [], address, storage, calibration, as_json):
        raise typer.Exit(code)


@checkpoints_app.command("ls")
def checkpoints_ls(
    url: Annotated[str, typer.Argument(help="A run's folder, or the folder over all runs.")],
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """List committed checkpoints."""
    from jobs.checkpoints import list_checkpoints

    rows = list_checkpoints(url)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("run", "step", "attempt", "saved", "world size", "tokens", "MB", "")
    for row in rows:
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
        known = (
            (row["world_size"], f"{row['tokens']:,}", f"{row['bytes'] / 1e6:.1f}") if not row["damaged"] else ("?",) * 3
        )
        note = row["damaged"] or ("pinned" if row["pinned"] else "")
        table.add_row(row["run_id"], *map(str, (row["step"], row["attempt"], saved, *known)), note)
    Console().print(table)


@checkpoints_app.command("show")
def checkpoints_show(
    url: CheckpointUrl,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Show what a checkpoint holds."""
    from jobs.checkpoints import show

    found = show(url)
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    for key in ("run_id", "step", "attempt", "world_size", "counters", "identity"):
        console.print(f"{key}: {found[key]}")
    table = Table("kind", "tensor", "shape")
    for tensor in found["tensors"]:
        table.add_row(tensor["kind"], tensor["name"], str(tensor["shape"]))
    console.print(table)


@checkpoints_app.command("diff")
def checkpoints_diff(
    first: CheckpointUrl,
    second: CheckpointUrl,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Compare two checkpoints, tensor by tensor."""
    from jobs.checkpoints import diff

    differences = diff(first, second)
    equal = all(difference.bitwise_equal for difference in differences)
    largest = max((d.max_abs for d in differences if d.max_abs is not None), default=None)
    if as_json:
        tensors = [asdict(difference) for difference in differences]
        typer.echo(json.dumps({"bitwise_equal": equal, "max_abs": largest, "tensors": tensors}))
        return
    table = Table("kind", "tensor", "largest difference", "bitwise equal")
    for d in differences:
        table.add_row(d.kind, d.name, d.note or f"{d.max_abs:.3g}", "yes" if d.bitwise_equal else "no")
    console = Console()
    console.print(table)
    console.print("bitwise equal" if equal else f"different; largest difference {largest}")


@checkpoints_app.command("verify")
def checkpoints_verify(url: CheckpointUrl, as_json: AsJson = False, s3_endpoint: S3Endpoint = "") -> None:
    """Read every byte of a checkpoint and check it against its hashes; exit code 5 where one is wrong."""
    from jobs.checkpoints import verify

    found = verify(url)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        for text in found.damaged:
            typer.echo(text, err=True)
        typer.echo(
            f"step {found.step}: {found.files} file(s), {found.bytes / 1e6:.1f} MB, {len(found.damaged)} damaged"
        )
    if found.damaged:
        raise typer.Exit(5)


@checkpoints_app.command("rm")
def checkpoints_rm(
    url: CheckpointUrl,
    force: Annotated[
        bool, typer.Option("--force", help="Also the newest one, with which the run would go on.")
    ] = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Delete the checkpoint at FOLDER@STEP."""
    from jobs.checkpoints import remove

    typer.echo(f"deleted: {remove(url, force)}")


@checkpoints_app.command("pin")
def checkpoints_pin(
    url: CheckpointUrl,
    undo: Annotated[bool, typer.Option("--undo", help="Let it go again.")] = False,
    reason: Annotated[str, typer.Option(help="For people.")] = "",
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Keep a checkpoint, whatever the run's retention says."""
    from jobs.checkpoints import pin

    typer.echo(f"{'not pinned any more' if undo else 'pinned'}: {pin(url, reason, undo)}")


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


@bench_app.command("plan")
def bench_plan(
    overrides: Overrides = None,
    turns: Annotated[int, typer.Option(min=1, help="Of calibration and steps, for each config and world size.")] = 3,
    only: Annotated[str, typer.Option(help="One config by name; without it all of them.")] = "",
    as_json: AsJson = False,
) -> None:
    """The plan's memory and step time against what a run takes on this machine."""
    from jobs.bench.plan import against_reality

    _print_result(against_reality(overrides or [], turns, only, _say), as_json)


@bench_app.command("variants")
def bench_variants(
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 3,
    table: Annotated[Path | None, typer.Option(help="Where a Markdown table goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """The loss after a minute of training with each of the optimizer's variants."""
    from jobs.bench.variants import variants

    _print_result(variants(overrides or [], seeds, table, _say), as_json)


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


@bench_app.command("curves")
def bench_curves(
    overrides: Overrides = None,
    picture: Annotated[Path, typer.Option(help="Where the PNG goes.")] = Path("curves.png"),
    as_json: AsJson = False,
) -> None:
    """Muon against AdamW on the demo, each at its best of three learning rates, in one picture."""
    from jobs.bench.curves import curves

    _print_result(curves(picture, overrides or [], _say), as_json)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    typer.echo(json.dumps(result) if as_json else json.dumps(result, indent=2))


def main() -> None:
    """Run the command line; the console script's entry."""
    try:
        code = app(standalone_mode=False) or 0
    except RaymuonError as error:
        sys.stderr.write(f"raymuon: {error}\n")
        code = error.exit_code
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        sys.stderr.write("raymuon: interrupted\n")
        code = 130
    except typer.TyperException as error:  # A wrong option or a missing argument.
        sys.stderr.write(f"raymuon: {error.format_message()}; see raymuon --help\n")
        code = 2
    sys.exit(code)


if __name__ == "__main__":  # How a submitted job starts: it has our code in its working directory.
    main()
