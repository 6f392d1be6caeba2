"""Text to tokens."""

from functools import partial
from typing import Annotated

import typer

from jobs.cli.options import AsJson, Config, Overrides
from jobs.screen import command
from orchestrator.stop import StopSignal

app = typer.Typer()


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; RAY_ADDRESS also counts. None: a local Ray.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the token shards of a config's sources; train does it, too, where it is not done."""
    stop = StopSignal(partial(_way_on, config, overrides or [], address))
    stop.listen()
    from jobs.prepare import prepare

    prepare(config, overrides or [], address, stop, as_json)


def _way_on(config: str, overrides: list[str], address: str | None, run_id: str) -> str:
    on = ["--address", address] if address else []
    return f"what is finished is kept; go on with: {command('raymuon', 'prepare', config, *overrides, *on)}"
