"""What was trained, evaluated."""

import sys
from typing import Annotated

import typer

from jobs.cli.options import AsJson, RayAddress, RunEndpoint, TrackingUri
from jobs.screen import command
from orchestrator.config import DEFAULT_TRACKING_URI
from orchestrator.stop import StopSignal

app = typer.Typer()


@app.command()
def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            help="A run's id, name or folder, its newest checkpoint, or RUN@STEP; or a Hugging Face folder."
        ),
    ],
    tasks: Annotated[
        list[str], typer.Option(help="Tasks or groups of lm-eval, with commas; `stdlib` needs no network.")
    ],
    series: Annotated[bool, typer.Option("--series", help="All checkpoints of the run.")] = False,
    task_folder: Annotated[str, typer.Option(help="With task files of your own, and their data.")] = "",
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; else the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; not put on record.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the chat template that the model was tuned with.")
    ] = False,
    system: Annotated[str, typer.Option(help="What the system says first in each conversation.")] = "",
    unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Let tasks run what the model has written.")
    ] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="That go through the model at once.")] = 16384,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    address: RayAddress = None,
    as_json: AsJson = False,
    s3_endpoint: RunEndpoint = "",
) -> None:
    """Evaluate checkpoints with lm-eval's tasks, and put the figures into the run's record."""
    stop = StopSignal(_way_on)
    stop.listen()
    from jobs.evaluation.command import Asked, check_tasks, evaluate

    asked = Asked(
        what=what,
        tasks=check_tasks(tasks),
        series=series,
        task_folder=task_folder,
        shots=shots,
        limit=limit,
        chat=chat,
        system=system,
        unsafe_code=unsafe_code,
        batch_tokens=batch_tokens,
        tracking_uri=tracking_uri,
        s3_endpoint=s3_endpoint,
        address=address,
    )
    evaluate(asked, stop, as_json)


def _way_on(run_id: str) -> str:
    return f"what is on record stays; begin again with: {command('raymuon', *sys.argv[1:])}"
