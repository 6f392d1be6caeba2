"""The entry of the command and of a submitted job, which has our code in its working directory.

What asks for an end in the half second in which Python imports the command line gets it at once, and in one line: an
exception would come out of whatever is being imported, as its traceback. After the command's end the exit code is its
own, whatever comes then, and Python does not take itself down: it would free a million objects of torch and MLflow one
by one, for most of a second, so that the system frees nothing.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


def main() -> None:
    """Run the command line; the console script's entry."""
    on_signals(_interrupted)
    codes: list[int] = []
    atexit.register(_leave, codes)  # The first one is called last.
    atexit.register(on_signals, signal.SIG_IGN)  # From there on Python hears nothing.
    from jobs.cli import main

    try:
        main()
    except SystemExit as end:
        codes += [end.code] if isinstance(end.code, int) else []
        raise


def on_signals(handler: Callable[..., Any] | signal.Handlers) -> None:
    """Have what asks for an end handled so, but for what is ignored, as under nohup."""
    for name in SIGNALS:
        if signal.getsignal(name) is not signal.SIG_IGN:
            signal.signal(name, handler)


def _leave(codes: list[int]) -> None:
    """End at once with the command's exit code, if it came to one; a crash is told and ended by Python."""
    for code in codes:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # Nobody may read it; what had to be told has been.
                stream.flush()
        os._exit(code)


def _interrupted(*_: object) -> None:
    with suppress(OSError):  # Nobody may read it.
        os.write(2, b"raymuon: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
