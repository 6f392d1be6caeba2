"""Studies: what is found out about runs that are there, or by many of them."""

from typing import Annotated

import typer

from jobs.cli.options import AsJson, RayAddress, S3Endpoint, TrackingUri
from orchestrator.config import DEFAULT_TRACKING_URI
from orchestrator.stop import StopSignal

app = typer.Typer()
study_app = typer.Typer(no_args_is_help=True, help="Find out about runs that are there.")
app.add_typer(study_app, name="study")


@study_app.callback()
def study() -> None:
    """Keep the group a group while it has one command."""


@study_app.command("spectrum")
def study_spectrum(
    what: Annotated[list[str], typer.Argument(help="Runs or checkpoints: id, name, folder, each with @STEP.")],
    series: Annotated[bool, typer.Option("--series", help="All checkpoints of each run.")] = False,
    group: Annotated[list[str] | None, typer.Option(help="Only these matrices; may be given several times.")] = None,
    split: Annotated[str, typer.Option(help="Matrices within a parameter: none, fused or heads.")] = "none",
    out: Annotated[str, typer.Option(help="A new folder; else one under runs/spectra.")] = "",
    log: Annotated[bool, typer.Option("--log", help="Also put it into each run in MLflow.")] = False,
    address: RayAddress = None,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Singular values and SVD entropy of weight matrices, by group and layer: of a run, or of several to compare."""
    stop = StopSignal(lambda run_id: "")
    stop.listen(outlive_terminal=False)
    from jobs.study.spectrum import Request, spectrum

    request = Request(tuple(what), series, tuple(group or ()), split, out, log, address, tracking_uri, s3_endpoint)
    spectrum(request, stop, as_json)
