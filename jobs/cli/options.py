"""Arguments and options that several commands share."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def greater_than_0(value: float | None) -> float | None:
    """Refuse an option's value that is not, or is infinite; typer's own limits take 0, and nan."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"must be a finite number greater than 0, not {value:g}")
    return value


def at_least_0(value: float | None) -> float | None:
    """Refuse an option's value that is not, or is infinite."""
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"must be a finite number of 0 or more, not {value:g}")
    return value


def with_files(settings: Sequence[str]) -> list[str]:
    """Return the options that name settings files, for a command that can be pasted."""
    return [part for file in settings for part in ("--with", file)]


def writable(file: Path | None) -> Path | None:
    """Refuse a file that could not be written at the end of a long command; its folder is made."""
    if file is None:
        return None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise PermissionError("no right to")
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be written ({error})") from error
    return file


S3Endpoint = Annotated[str, typer.Option(help="Of an S3 store that is not AWS.")]
BUILT_IN = sorted(file.stem for file in Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))
"""Names of the built-in configs."""
Config = Annotated[
    str,
    typer.Argument(help=f"A YAML file, or a built-in config: {', '.join(BUILT_IN)}.", autocompletion=lambda: BUILT_IN),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for instance optim.lr=1e-2.")]
SettingsFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--with", help="A study's settings.yaml, over CONFIG and under key=value; may be given several times."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on the last line of stdout.")]
Run = Annotated[str, typer.Argument(help="A run's id or name in MLflow, or the URL of its folder.")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="Of the MLflow that has the run.")]
RunEndpoint = Annotated[str, typer.Option("--s3-endpoint", help="Of an S3 store that is not AWS; else the run's own.")]
RayAddress = Annotated[str | None, typer.Option(help="Ray cluster; RAY_ADDRESS also counts. None: a local Ray.")]
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
