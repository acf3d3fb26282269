"""A locked scratch folder beside a destination: complete, then renamed, or gone.

The scratch folder has a fixed name, so that the leftover of an export that was killed is
found by the next one to the same destination. Its lock tells a leftover from an export
that is still running: the kernel drops a dead process's lock.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .destination import check_outside_packages, is_package, is_package_zip
from .errors import ExportError
from .journal import JOURNAL_NAME, read_journal, sync

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Staging:
    """The scratch folder of one export; `written` counts the bytes that `disk` announced.

    `claim` or `claim_empty` first; then `publish`, `discard` or `leave`. The destination is
    touched by `publish` only, and an existing one stays whole until its successor is. `failed`
    tells that a step on the disk did.
    """

    def __init__(self, destination: Path, *, overwrite: bool) -> None:
        # Not resolved: a destination that is a symlink is refused, not followed.
        self.destination = destination.absolute()
        if self.destination.name in ("", ".."):
            raise ExportError(f"{destination}: names no file or folder to write")
        self.folder = self._beside("partial")
        self.written = 0
        self.failed = False
        self._overwrite = overwrite
        self._lock = -1
        self._scratch: Path | None = None
        self._made: list[Path] = []

    def claim(self) -> None:
        """Make the scratch folder, or take the one that a dead export left, as it is.

        Raises `ExportError` if the destination exists and may not be replaced, or if
        another export to it is running.
        """
        try:
            with self.disk(0):
                self._make_parents()
                self._take_lock()
                self._recover()
                self.check_destination()
        except BaseException:
            if self._scratch is not None and any(self._scratch.iterdir()):
                self.leave()
            else:
                self.discard()
            raise

    def claim_empty(self) -> None:
        """`claim`, and remove what is left there; raises `ExportError` if that can be resumed."""
        self.claim()
        if (found := unfinished(self.destination)) is not None:
            self.leave()
            raise ExportError(
                f"{found.folder}: an unfinished import with {found.shards:,} experts is there",
                hint="Finish it by the same `import` command, remove it, or choose another name.",
            )
        try:
            self.clear()
        except BaseException:
            self.discard()
            raise

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what is in the scratch folder but the files `keep`, by path."""
        with self.disk(0):
            for place, _, files in os.walk(self.folder, topdown=False):
                for name in files:
                    path = Path(place, name)
                    if path.relative_to(self.folder).as_posix() not in keep:
                        path.unlink()
                for entry in Path(place).iterdir():
                    if entry.is_symlink():
                        entry.unlink()
                    elif entry.is_dir():
                        with suppress(OSError):  # it holds what is kept
                            entry.rmdir()

    def leave(self) -> None:
        """Let go of the scratch folder, and leave it for another to claim."""
        self._made.clear()
        self._scratch = None
        self.discard()

    def publish(self, content: Path) -> None:
        """Make `content`, the scratch folder or a file in it, the destination; durably."""
        with self.disk(0):
            _sync_tree(self.folder)
            (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
            if content != self.folder:
                content.replace(self.destination)
            elif self.destination.exists():
                self._replace_folder()
            else:
                self.folder.rename(self.destination)
                self._scratch = None
            sync(self.destination.parent)
        self._made.clear()
        self.discard()

    def discard(self) -> None:
        """Remove the scratch folder and any parent folder made for it."""
        # Only what this export holds the lock of: the name may already be another's.
        if self._scratch is not None:
            _remove(self._scratch)
            self._scratch = None
        for parent in reversed(self._made):
            with suppress(OSError):
                parent.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _replace_folder(self) -> None:
        old = _try_lock(self.destination)
        if old is None:
            raise self._busy()
        if _exchange(self.folder, self.destination):
            # The old package now lies under the scratch name: hold its lock, drop the other.
            old, self._lock = self._lock, old
        else:
            replaced = self._beside("replaced")
            self.destination.rename(replaced)
            try:
                self.folder.rename(self.destination)
            except BaseException:
                replaced.rename(self.destination)
                raise
            self._scratch = replaced
        os.close(old)

    @contextmanager
    def disk(self, needed: int) -> Iterator[None]:
        """Run a step that writes `needed` bytes; its `OSError` becomes an `ExportError`."""
        try:
            yield
        except OSError as error:
            self.failed = True
            if error.errno not in _FULL:
                raise ExportError(
                    f"{self.destination}: cannot be written: {error.strerror or error}"
                ) from error
            free = shutil.disk_usage(self.folder.parent).free
            raise ExportError(
                f"{self.destination}: the disk is full: {self.written:,} bytes are written,"
                f" the next {needed:,} are needed, {free:,} are free",
                hint="Nothing was left behind. Free some space, or choose another disk.",
            ) from error
        self.written += needed

    def _beside(self, suffix: str) -> Path:
        return self.destination.with_name(f".{self.destination.name}.{suffix}")

    def _make_parents(self) -> None:
        missing = [self.destination.parent, *self.destination.parent.parents]
        for parent in reversed(missing):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                self._made.append(parent)

    def _take_lock(self) -> None:
        while True:
            self.folder.mkdir(exist_ok=True)
            lock = _try_lock(self.folder)
            if lock is None:
                raise self._busy()
            # The one who held it may have renamed or removed the folder meanwhile.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), self.folder.lstat()):
                    self._lock = lock
                    self._scratch = self.folder
                    return
            os.close(lock)

    def _busy(self) -> ExportError:
        return ExportError(
            f"{self.destination}: another export to it is running ({self.folder.name})"
        )

    def _recover(self) -> None:
        """Finish what an export that was killed while it replaced a package had begun."""
        replaced = self._beside("replaced")
        if not replaced.exists():
            return
        if self.destination.exists():
            _remove(replaced)
        else:
            replaced.rename(self.destination)

    def check_destination(self) -> None:
        """Raise `ExportError` if something is there that may not be replaced, `InputError` if
        the place is inside another package."""
        place = self.destination
        check_outside_packages(place)
        if not os.path.lexists(place):
            return
        # Only a package is ever replaced: not a home folder that was named by mistake.
        package = not place.is_symlink() and (is_package_zip(place) or _is_package_folder(place))
        if not self._overwrite:
            raise ExportError(
                f"{place}: exists already",
                hint="Choose another name, or allow it to be replaced (`--force`)."
                if package
                else "Choose another name: it is no package, and nothing else is ever replaced.",
            )
        if not package:
            raise ExportError(
                f"{place}: expected a package to replace, found something else",
                hint="Choose another name, or remove it first.",
            )
        if place.is_dir() == (place.suffix == ".zip"):
            raise ExportError(f"{place}: a folder and a single file do not replace each other")


class Unfinished(NamedTuple):
    """What a resumable writer left: the folder, and how many shards of how many bytes."""

    folder: Path
    shards: int
    bytes: int


def unfinished(destination: Path) -> Unfinished | None:
    """What a writer to `destination` that was cut off has left to resume, if anything."""
    folder = Staging(destination, overwrite=False).folder
    found = read_journal(folder)
    if found is None or not found.shards:
        return None
    sizes = {(one.layer, one.expert): one.bytes for one in found.shards}
    return Unfinished(folder, len(sizes), sum(sizes.values()))


def start_writeback(fd: int) -> None:
    """Have the disk begin on what was written, without waiting: the sync at the end is shorter.

    Linux starts the writing when it is told that the pages are not needed; elsewhere it is
    a hint at most.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None if another process holds it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _is_package_folder(path: Path) -> bool:
    return path.is_dir() and (is_package(path) or not any(path.iterdir()))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(place, name))
        sync(Path(place))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result: int = rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    return result == 0
