"""Runs: start one, go on with it, look at it, stop it, train a stretch of it once more."""

import os
import sys
from functools import partial
from typing import Annotated

import typer

from jobs.cli.options import (
    DEFAULT_HEAD,
    AllowOpen,
    AsJson,
    CalibrationFile,
    ClientTracking,
    Config,
    Follow,
    GpuType,
    Head,
    Image,
    JobHead,
    Overrides,
    Pin,
    RayAddress,
    Run,
    RunEndpoint,
    SettingsFiles,
    TrackingUri,
    at_least_0,
    with_files,
)
from orchestrator.config import DEFAULT_TRACKING_URI
from orchestrator.stop import StopSignal

app = typer.Typer()


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    settings: SettingsFiles = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: go on with the unfinished run of that name; RUN: with that one; never: a new run."),
    ] = "never",
    address: RayAddress = None,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="With --resume: take the run from a driver that leads it.")
    ] = False,
    as_json: AsJson = False,
    kill_worker: Annotated[
        int | None, typer.Option(min=1, help="For demonstrations: SIGKILL one worker after this step.")
    ] = None,
    no_look: Annotated[
        bool, typer.Option("--no-look", help="Start although the plan says that memory will not do.")
    ] = False,
) -> None:
    """Train a run from its start, or go on with one."""
    given = [config, *(overrides or []), *with_files(settings or [])]
    stop = StopSignal(partial(way_on, given, address))
    stop.listen()  # Before the slow imports.
    from jobs.settings import configured
    from jobs.train import train

    found = configured(config, settings or [], overrides or [])
    train(found, given, resume, address, stop, as_json, kill_worker, takeover, not no_look)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    settings: SettingsFiles = None,
    address: Head = DEFAULT_HEAD,
    follow: Follow = False,
    tracking_uri: ClientTracking = "",
    image: Image = "",
    pin: Pin = False,
    gpu_type: GpuType = "",
    calibration: CalibrationFile = None,
    allow_open_head: AllowOpen = False,
    study: Annotated[bool, typer.Option("--study", help="CONFIG is a study's file, or the name of one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Plan a new run, and submit it as a job to a Ray cluster; or submit a study."""
    from jobs.settings import configured
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
    if study:
        from jobs.study.submit import submit_study

        if settings:
            raise typer.BadParameter("--with: a study's settings stand in its file")
        submit_study(config, overrides or [], target, follow, as_json)
        return
    submit(configured(config, settings or [], overrides or []), target, follow, as_json)


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
    wait: Annotated[float, typer.Option(callback=at_least_0, help="Seconds to wait for its end.")] = 600.0,
    address: JobHead = "",
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    allow_open_head: AllowOpen = False,
) -> None:
    """Ask a run's job to finish its step, save and end; it can go on later."""
    from jobs.control import stop
    from jobs.runs import find

    stop(find(run, tracking_uri), address, allow_open_head, wait)


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
def replay(
    run: Run,
    overrides: Overrides = None,
    steps: Annotated[
        str, typer.Option(help="A:B; without A from the newest checkpoint before B, without B to the last on record.")
    ] = "",
    workers: Annotated[int | None, typer.Option(min=1, help="As many as the run had, where it is not given.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            callback=at_least_0, help="Relative difference of a loss that is borne; ten times that of a norm."
        ),
    ] = None,
    address: RayAddress = None,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    s3_endpoint: RunEndpoint = "",
    as_json: AsJson = False,
) -> None:
    """Train a stretch of a run once more, and compare losses and gradient norms with its record."""
    stop = StopSignal(lambda _: f"nothing is compared; replay it again with: {_same()}")
    stop.listen()  # Before the slow imports.
    from jobs.replay import Request, replay

    request = Request(run, steps, tracking_uri, s3_endpoint, address, workers, tolerance, tuple(overrides or []))
    replay(request, stop, as_json)


def way_on(given: list[str], address: str | None, run_id: str) -> str:
    """Return how to go on with a run that was ended, or, where none has begun, how to begin again.

    Args:
        given: the config and what else says how the run is trained, as arguments.
        address: of the cluster, if one was named.
        run_id: of the run; empty where none has begun.
    """
    if not run_id:
        return f"nothing has begun; begin again with: {_same()}"
    from jobs.screen import command
    from orchestrator.group.cluster import JOB_VARIABLE  # Ray is there by now.

    if JOB_VARIABLE in os.environ:  # Not here: from where it was submitted.
        return f"go on with: raymuon resume {run_id}"
    place = [] if address is None else ["--address", address]
    return f"go on with: {command('raymuon', 'train', *given, *place, '--resume', run_id)}"


def _same() -> str:
    from jobs.screen import command

    return command("raymuon", *sys.argv[1:])
