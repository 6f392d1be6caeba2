"""Before a run: its config, what it needs, whether the cluster is fit for it."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import (
    AsJson,
    CalibrationFile,
    Config,
    GpuType,
    Overrides,
    RayAddress,
    SettingsFiles,
    greater_than_0,
    writable,
)

app = typer.Typer()


@app.command(name="config")
def config_(config: Config = "demo", overrides: Overrides = None, settings: SettingsFiles = None) -> None:
    """Print a config with all its keys, resolved and documented."""
    from jobs.load import documented_yaml
    from jobs.settings import configured, warn

    found = configured(config, settings or [], overrides or [])
    warn(found)
    typer.echo(documented_yaml(found.config, found.origins))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, max=65536, help="Data-parallel ranks; may be given several times.")
    ] = None,
    gpu_type: GpuType = "",
    calibration: CalibrationFile = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="That share a node's memory and network.")] = 8,
    network: Annotated[float, typer.Option(callback=greater_than_0, help="Gbit/s of a node, with --gpu-type.")] = 400.0,
    price: Annotated[
        float | None, typer.Option(callback=greater_than_0, help="Money per GPU-hour, of any currency.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="To train on, in the place of train.steps.")] = None,
    mtbf: Annotated[
        float | None,
        typer.Option(callback=greater_than_0, help="Mean hours between failures of one GPU with its share of a node."),
    ] = None,
    largest: Annotated[
        bool, typer.Option("--largest", help="Find the most layers with which the model still fits, all else as it is.")
    ] = False,
    settings: SettingsFiles = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run needs before it is started: memory, traffic, time, money; refuse what cannot fit."""
    from jobs.planning.command import read_calibration, show
    from jobs.planning.estimate import Machines
    from jobs.planning.plan import Terms
    from jobs.settings import configured, warn

    found = configured(config, settings or [], overrides or [])
    warn(found)
    counts = gpus or [found.config.scaling.max_workers]
    machines = Machines(
        gpus=counts[0],
        gpus_per_node=gpus_per_node,
        gpu_type=gpu_type,
        calibration=read_calibration(calibration) if calibration else None,
        network_gbit=network,
    )
    terms = Terms(price=price, tokens=tokens, mtbf_hours=mtbf)
    show(found.config, counts, machines, terms, as_json, largest, found.told())


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="Of the run that is meant to start. None: the cluster alone.")
    ] = None,
    overrides: Overrides = None,
    address: RayAddress = None,
    storage: Annotated[str, typer.Option(help="Folder (fsspec URL) to check in checkpoint.url's place.")] = "",
    calibration: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write what was measured for `raymuon plan --calibration`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a cluster, storage and tracking before money is spent: exit code 3 or 5 where something would fail."""
    from jobs.doctor.command import doctor

    if code := doctor(config, overrides or [], address, storage, calibration, as_json):
        raise typer.Exit(code)


@app.command()
def stack(
    folder: Annotated[str, typer.Option(help="For all its files; what is there is gone on with.")] = "runs/stack",
    nodes: Annotated[int, typer.Option(min=1, help="Of Ray, beside the head.")] = 2,
    gpus: Annotated[int, typer.Option(min=0, help="Logical GPUs of each node.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processors of each node, as Ray counts.")] = 1,
) -> None:
    """Run Ray with several nodes, MLflow and S3 on this machine until Ctrl-C, without containers."""
    from jobs.stack.local import stack

    stack(folder, nodes, gpus, workers)
