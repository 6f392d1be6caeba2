"""Files on a disk that are there whole or not at all, and survive a power cut, whatever the file system can do."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
"""What a file system answers that does not have what it is asked for: hard links, or the syncing of a folder."""


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Name a temporary file beside the target; it is gone afterwards, and the target's name survives a power cut."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


@contextmanager
def temporary_with(target: Path, data: bytes) -> Iterator[Path]:
    """The same, with `data` in it."""
    with temporary_beside(target) as temporary:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, unless that is taken: of several only one can.

    A hard link does it in one step. Where there are none (exFAT, many FUSE and SMB mounts) an empty file takes the
    name, and the finished one its place at once. Who dies between the two leaves an empty file: readers know by its
    hash that it is not what was written.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            temporary.replace(target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def create(target: Path, data: bytes) -> bool:
    """Write a file that must not be there yet; True also where its content is there already."""
    try:
        with temporary_with(target, data) as temporary:
            publish(temporary, target)
    except FileExistsError:
        sync_folder(target.parent)  # An earlier try may have ended before that.
        return target.read_bytes() == data
    return True


def sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)
