"""Studies: what is found out about runs that are there, or by many of them."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import AsJson, Config, Overrides, RayAddress, S3Endpoint, TrackingUri
from jobs.screen import command
from jobs.tell import tell
from orchestrator.config import DEFAULT_TRACKING_URI
from orchestrator.stop import StopSignal
from workers.common.errors import Interrupted

app = typer.Typer()
study_app = typer.Typer(no_args_is_help=True, help="Find out about runs that are there, or by many of them.")
app.add_typer(study_app, name="study")


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


@study_app.command("coordinates")
def study_coordinates(
    config: Config,
    overrides: Overrides = None,
    width: Annotated[list[int] | None, typer.Option(min=1, help="Two or more; 32 to 512 without it.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Of optim.width_rule; spectral and none without it.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="That each model trains.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Each model is trained once with each.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Whether activations stay as large as they are when a model gets wider, under each rule of widths."""
    from jobs.study.coordinates import show

    show(config, overrides or [], width or (32, 64, 128, 256, 512), rule or ("spectral", "none"), steps, seeds, as_json)


Source = Annotated[str, typer.Argument(help="A study's file, or the name of a shipped one.")]
RunOrSource = Annotated[str, typer.Argument(help="A study's run (id or name), its file, or the name of a shipped one.")]
Name = Annotated[str, typer.Option(help="Of the study, in the place of the file's.")]
StudyTracking = Annotated[
    str, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="In the place of the config's tracking.uri.")
]


@study_app.command("run")
def study_run(
    source: Source,
    overrides: Overrides = None,
    at_once: Annotated[int, typer.Option(min=0, help="Trials at a time; 0: as many as there is room for.")] = 0,
    name: Name = "",
    again_failed: Annotated[bool, typer.Option("--again-failed", help="Train failed trials again.")] = False,
    address: RayAddress = None,
    tracking_uri: StudyTracking = "",
    as_json: AsJson = False,
) -> None:
    """Run a study, or go on with it: its trials, several at a time, and its report."""
    stop = StopSignal(lambda run_id: f"{'go on' if run_id else 'begin again'} with: {_same()}")
    stop.listen()  # Before the slow imports.
    from jobs.study.command import Request, run

    request = Request(
        source=source,
        overrides=tuple(overrides or ()),
        name=name,
        tracking_uri=tracking_uri,
        address=address,
        at_once=at_once,
        again_failed=again_failed,
    )
    run(request, stop, as_json)


@study_app.command("status")
def study_status(
    source: RunOrSource, name: Name = "", tracking_uri: StudyTracking = "", as_json: AsJson = False
) -> None:
    """Show how far a study is: its trials, what it has cost and what is left."""
    from jobs.study.command import Request, status

    status(Request(source=source, name=name, tracking_uri=tracking_uri), as_json)


@study_app.command("report")
def study_report(
    source: RunOrSource,
    out: Annotated[str, typer.Option(help="A folder; else one under runs/studies.")] = "",
    name: Name = "",
    tracking_uri: StudyTracking = "",
    as_json: AsJson = False,
) -> None:
    """Write a study's report again, from MLflow alone."""
    from jobs.study.command import Request, report

    report(Request(source=source, name=name, tracking_uri=tracking_uri), out, as_json)


def _same() -> str:
    return command("raymuon", *sys.argv[1:])


@study_app.command("moonlight")
def study_moonlight(
    out: Annotated[Path, typer.Option(help="For everything: a new folder, or an interrupted study's.")] = Path(
        "runs/moonlight"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Of each fine-tuning.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A twentieth of the steps: to see that it works.")] = False,
    as_json: AsJson = False,
) -> None:
    """The Moonlight paper's way at the demo's size: tokenizer, stages, fine-tuning, evaluation, spectra, export."""
    from jobs.study.moonlight import moonlight, report

    try:
        found = moonlight(out.absolute(), seeds, partial(typer.echo, err=True), quick)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"interrupted; go on with: {_same()}") from None
    typer.echo(report(found))
    typer.echo(f"{out}/report.md, {out}/spectra/, {found['seconds'] / 60:.1f} minutes")
    if as_json:
        tell(found)
