"""One process, and in it one thread, at a time writes to a run folder.

The lock is a file in the folder with the number of the process that holds it. The kernel drops a
dead process's lock, so a file that a killed run left stands in nobody's way.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from evermind_manifests.errors import InputError

LOCK_NAME: Final = ".training.lock"

# (device, inode) of every lock file that this process holds → the thread that does. A thread may
# take a lock again within itself.
_held: dict[tuple[int, int], int] = {}
_guard = threading.Lock()


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Be the one that writes to a run folder, which is made if it is not there.

    Raises `InputError` if another is, or for what is no folder.
    """
    made = _make(folder)
    try:
        fd = _take(folder)
    except BaseException:
        _unmake(made)
        raise
    try:
        yield
    finally:
        if fd is not None:
            _release(folder, fd)
        _unmake(made)


def _make(folder: Path) -> list[Path]:
    """The folders that were made, outermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder: {error.strerror}") from error
    return missing[::-1]


def _unmake(made: list[Path]) -> None:
    for one in reversed(made):
        with suppress(OSError):  # a run is in it
            one.rmdir()


def _take(folder: Path) -> int | None:
    """A descriptor that holds the lock; None if this thread holds it already."""
    path = folder / LOCK_NAME
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            with _guard:
                place = _place(fd)
                if (owner := _held.get(place)) is not None:
                    if owner == threading.get_ident():
                        os.close(fd)
                        return None
                    raise _busy(folder, os.getpid())
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _busy(folder, _pid(fd)) from None
                # The one who held it may have removed the file meanwhile.
                if _is_at(fd, path):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    _held[place] = threading.get_ident()
                    return fd
        except InputError:
            os.close(fd)
            raise
        os.close(fd)


def _release(folder: Path, fd: int) -> None:
    with _guard:
        _held.pop(_place(fd), None)
        with suppress(OSError):
            (folder / LOCK_NAME).unlink()
        os.close(fd)


def _place(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _is_at(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def _pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _busy(folder: Path, pid: int | None) -> InputError:
    who = "another process" if pid is None else f"process {pid}"
    return InputError(
        f"{folder}: {who} is training there",
        hint="Wait until it is done, stop it (it leaves a checkpoint), or choose another folder.",
    )
