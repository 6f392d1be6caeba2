"""The command `raymuon`. Every error that a person can mend is one message and an exit code, never a traceback.

Exit codes: 0 ok, 2 config, 3 cluster, 4 training, 5 storage or tracking, 130 interrupted.
"""

import atexit
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from jobs.__main__ import on_signals
from jobs.cli import before, bench, checkpoints, convert, data, evaluate, generate, prepare, runs, study, tokenizer
from jobs.cli.options import BUILT_IN
from jobs.output import outlive_output
from optim.checks import ConfigProblems
from workers.common.errors import RaymuonError
from workers.common.text import visible

HELP = """Pretrain language models with Distributed Muon on Ray: workers may die, and the run goes on.

`raymuon train demo` shows it on this machine. Built-in configs: {configs}.

Exit codes: 0 ok, 2 config, 3 cluster, 4 training, 5 storage or tracking, 130 interrupted.
"""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=HELP.format(configs=", ".join(BUILT_IN)),
)
for commands in (runs, prepare, data, tokenizer, before, checkpoints, convert, generate, evaluate, study, bench):
    app.add_typer(commands.app)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"raymuon {version('raymuon')}")
        raise typer.Exit


@app.callback()
def raymuon(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take what goes before a command; the help is the application's."""


def main() -> None:
    """Run the command line."""
    outlive_output()
    heard = False

    def interrupt(*_: object) -> None:
        nonlocal heard
        heard = True
        raise KeyboardInterrupt

    try:
        # For what has no handler of its own: files that are only of this process are removed, as after a Ctrl-C.
        on_signals(interrupt)
        code, told = app(standalone_mode=False) or 0, ""
    except RaymuonError as error:
        code, told = error.exit_code, str(error)
    except (typer.Abort, KeyboardInterrupt):
        code, told = 130, "interrupted"
    except ConfigProblems as error:  # Of a value that an option or the environment has put into a config.
        code, told = 2, str(error)
    except typer.TyperException as error:  # A wrong option or a missing argument; empty where the help was shown.
        message = error.format_message()
        code, told = 2, message and f"{message}; see raymuon --help"
    if code == 130 and not told:  # Typer makes that of a KeyboardInterrupt, and says nothing.
        told = "interrupted"
    on_signals(lambda *_: os._exit(code))  # From here on there is nothing to end but what Python waits for.
    sys.stdout.flush()
    if told:
        sys.stderr.write(visible(f"raymuon: {told}\n"))
    if heard:  # CPython would end itself by SIGINT where the exception came out of an `exec`, as of many imports.
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
