"""What the person at the terminal wants: nothing, a clean stop, or an end at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from workers.errors import Interrupted


class StopSignal:
    """Counts the requests to stop.

    A signal handler only counts. Raising from it would unwind through Ray's C++ calls, which turn it into an error of
    their own; so whoever waits does so in short stretches and calls `check`.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.training = False

    def request(self) -> None:
        """Count a Ctrl-C or SIGTERM."""
        self.requests += 1

    def check(self) -> None:
        """Raise Interrupted after a second request, or after the first where there is no step to finish."""
        if self.requests >= (2 if self.training else 1):
            raise Interrupted("interrupted; what the last checkpoint holds is kept")

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """Mark the time in which there is a step to finish."""
        self.training = True
        try:
            yield
        finally:
            self.training = False
