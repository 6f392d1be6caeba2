"""Stdout and stderr of a process that outlives whoever reads them.

A pipe is closed (`| head -5`), a terminal vanishes, a disk is full, `2>&-` left none at all: what is written then is
dropped, by whichever library and thread, and the command goes on to its end and to its own exit code. Only where stdout
is what somebody wants to keep, a full disk below it is an error (`check_kept`). What a terminal has no characters for
is written as escapes.
"""

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from workers.common.errors import StorageError

ESCAPED = "backslashreplace"
"""What becomes of a character that the encoding of an output does not have, as of a terminal that is not UTF-8."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of a file that takes no more; whoever reads from a pipe or a terminal may go when it likes."""


class _Output(io.FileIO):
    """A file descriptor that takes everything."""

    lost: OSError | None = None
    """Why something could not be written."""

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # Who shares it has made it non-blocking, and it is full.
                select.select([], [self], [])
        except OSError as error:
            self.lost, written = error, memoryview(data).nbytes
        return written


def outlive_output() -> None:
    """Make stdout and stderr of this process such."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # Otherwise the next file that is opened, a database, gets this number and all that is printed.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _outlived(1, sys.stdout, sys.__stdout__)
    sys.stderr = _outlived(2, sys.stderr, sys.__stderr__)


def nobody_reads() -> bool:
    """Tell whether stdout has lost its reader."""
    return _lost() is not None


def check_kept() -> None:
    """Refuse to go on where a full disk has not taken what was written to stdout.

    Raises:
        StorageError: it has not.
    """
    error = _lost()
    if error is not None and error.errno in FULL:
        raise StorageError(f"stdout: {error.strerror}; what was written there is not whole")


def _lost() -> OSError | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Output) else None


def _outlived(descriptor: int, stream: TextIO | None, original: TextIO | None) -> TextIO:
    if stream is not None and (stream is not original or not isinstance(stream, io.TextIOWrapper)):
        return stream  # Somebody else's, as a test's.
    buffer = io.BufferedWriter(_Output(descriptor, "w", closefd=False))
    if stream is None:
        return io.TextIOWrapper(buffer, encoding="utf-8", errors=ESCAPED)
    stream.flush()
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=ESCAPED,
        line_buffering=stream.line_buffering or stream.write_through,  # PYTHONUNBUFFERED has the second alone.
        write_through=stream.write_through,
    )
