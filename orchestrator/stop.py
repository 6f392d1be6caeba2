"""What the person at the terminal wants: nothing, a clean stop, or an end at once.

SIGINT (Ctrl-C), SIGTERM (`kill`, a service manager, a cluster) and SIGQUIT (Ctrl-\\) ask for an end: the step is
finished and saved. SIGHUP says that the terminal is gone, and nothing about the run: it goes on, as under nohup.
SIGPIPE is ignored, by Python itself: that nobody reads the output does not end a run either.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from workers.common.errors import Interrupted

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
ONE_S = 0.5
"""Signals within this time are one: `timeout` sends its own to a process and to the group that it is in, a terminal's
Ctrl-C comes from the terminal and from whoever hands it on."""


class StopSignal:
    """Counts the requests to stop.

    The handler of a signal counts. Raising from it would unwind through Ray's C++ calls, which turn it into an error of
    their own; so whoever waits does so in short stretches and calls `check`. What takes long, cannot check and leaves
    nothing half done does it `abruptly`.

    Args:
        way_on: tells how to go on with the run of an id, or, of an empty one, how to begin again.
        clock: in seconds, of any beginning.
    """

    def __init__(
        self, way_on: Callable[[str], str] = lambda run_id: "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.requests = 0
        self.training = False
        self.run_id = ""
        """Of the run that has begun."""
        self._way_on, self._clock = way_on, clock
        self._heard, self._at_once, self._raises = -math.inf, True, False

    def listen(self, outlive_terminal: bool = True, at_once: bool = True) -> None:
        """Take the signals of this process from now on.

        Args:
            outlive_terminal: ignore SIGHUP; otherwise it is a request as any other.
            at_once: one more than `check` needs ends the process where it stands, whatever it waits for.
        """
        self._at_once = at_once
        for name in ENDING if outlive_terminal else (*ENDING, signal.SIGHUP):
            signal.signal(name, self._hear)
        if outlive_terminal:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def request(self) -> None:
        """Count a request."""
        self.requests += 1

    def _hear(self, *_: object) -> None:
        """Take a signal."""
        now = self._clock()
        if now - self._heard < ONE_S:
            return
        self._heard = now
        if self._at_once and self.requests >= self._enough:
            with suppress(OSError):  # Nobody may read it.
                os.write(2, f"raymuon: {self.interrupted('ended at once')}\n".encode())
            os._exit(Interrupted.exit_code)
        self.request()
        if self._raises:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise Interrupted after a second request, or after the first where there is no step to finish."""
        if self.requests >= self._enough:
            text = "ended at once; what the last checkpoint holds is kept" if self.training else "interrupted"
            raise self.interrupted(text)

    def interrupted(self, text: str) -> Interrupted:
        """Return the error that ends the command, with the way on as its last words."""
        return Interrupted("; ".join(filter(None, (text, self._way_on(self.run_id)))))

    @contextmanager
    def abruptly(self) -> Iterator[None]:
        """Have the handler of a signal raise meanwhile, as Python's own does; it comes out as Interrupted."""
        self._raises = True
        try:
            yield
            self._raises = False
            self.check()  # Whatever was done may have swallowed the exception.
        except KeyboardInterrupt:
            raise self.interrupted("interrupted") from None
        finally:
            self._raises = False

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """Mark the time in which there is a step to finish."""
        self.training = True
        try:
            yield
        finally:
            self.training = False

    @property
    def _enough(self) -> int:
        return 2 if self.training else 1
