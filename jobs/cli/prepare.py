"""Text to tokens."""

from functools import partial

import typer

from jobs.cli.options import AsJson, Config, Overrides, RayAddress
from jobs.screen import command
from orchestrator.stop import StopSignal

app = typer.Typer()


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    address: RayAddress = None,
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
