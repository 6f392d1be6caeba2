"""The process's heap."""

import ctypes
from contextlib import suppress


def trim() -> None:
    """Give freed memory back to the system: glibc keeps it, in a heap for each of many threads, whose runs are over."""
    with suppress(OSError, AttributeError):  # There are other C libraries.
        ctypes.CDLL(None).malloc_trim(0)
