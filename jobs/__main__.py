"""The entry of the command and of a submitted job, which has our code in its working directory.

What asks for an end in the half second in which Python imports the command line gets it at once, and in one line: an
exception would come out of whatever is being imported, as its traceback. After the command's end the exit code is its
own, whatever comes while Python takes itself down.
"""

import atexit
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


def main() -> None:
    """Run the command line; the console script's entry."""
    on_signals(_interrupted)
    atexit.register(on_signals, signal.SIG_IGN)  # The first one is called last; from there on Python hears nothing.
    from jobs.cli import main

    main()


def on_signals(handler: Callable[..., Any] | signal.Handlers) -> None:
    """Have what asks for an end handled so, but for what is ignored, as under nohup."""
    for name in SIGNALS:
        if signal.getsignal(name) is not signal.SIG_IGN:
            signal.signal(name, handler)


def _interrupted(*_: object) -> None:
    with suppress(OSError):  # Nobody may read it.
        os.write(2, b"raymuon: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
