"""Text to tokens."""

from functools import partial

import typer

from jobs.cli.options import AsJson, Config, Overrides, RayAddress, SettingsFiles, with_files
from jobs.screen import command
from orchestrator.stop import StopSignal

app = typer.Typer()


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    settings: SettingsFiles = None,
    address: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Make the token shards of a config's sources; train does it, too, where it is not done."""
    stop = StopSignal(partial(_way_on, config, settings or [], overrides or [], address))
    stop.listen()
    from jobs.prepare import prepare
    from jobs.settings import configured

    prepare(configured(config, settings or [], overrides or []).config, address, stop, as_json)


def _way_on(config: str, settings: list[str], overrides: list[str], address: str | None, run_id: str) -> str:
    on = [*with_files(settings), *(["--address", address] if address else [])]
    return f"what is finished is kept; go on with: {command('raymuon', 'prepare', config, *overrides, *on)}"
