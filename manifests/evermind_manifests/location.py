"""The places a user names: opened, or refused with an error that names them."""

from __future__ import annotations

import errno
import os
import stat

from .errors import LocationError

_SHOWN = 100


def shorten(location: str | os.PathLike[str]) -> str:
    """`location` for a message: the middle of a very long one is left out."""
    text = os.fspath(location)
    return text if len(text) <= 3 * _SHOWN else f"{text[:_SHOWN]}…{text[-_SHOWN:]}"


def open_location(location: str | os.PathLike[str], flags: int = 0) -> int:
    """A read-only descriptor of the file or folder at `location`; the caller closes it.

    Raises `LocationError` where nothing is there or it may not be read.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        return os.open(location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ENOENT:
            reason = "there is no such folder or file"
        raise LocationError(f"{shorten(location)}: {reason}") from error
    except ValueError as error:
        raise LocationError(f"{shorten(location)!r}: {error}") from None


def open_regular(location: str | os.PathLike[str]) -> tuple[int, int]:
    """(descriptor, length in bytes) of the regular file at `location`; see `open_location`."""
    fd = open_location(location)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise LocationError(f"{shorten(location)}: expected a regular file")
    return fd, info.st_size


def read_head(location: str | os.PathLike[str], count: int) -> bytes | None:
    """The first bytes of a regular file, at most `count`; None for a folder.

    Raises `LocationError` for anything else, and for what cannot be read.
    """
    fd = open_location(location)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            return None
        if not stat.S_ISREG(mode):
            raise LocationError(f"{shorten(location)}: expected a folder or a regular file")
        try:
            return os.pread(fd, count, 0)
        except OSError as error:
            raise LocationError(f"{shorten(location)}: {error.strerror}") from error
    finally:
        os.close(fd)
