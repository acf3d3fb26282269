"""Where a package's bytes come from: a folder here, a single file in `zip_store.py`.

A store moves bytes and decides nothing: sizes and digests are checked by its callers.
Both stores use positioned reads only, so one store serves many threads.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from .descriptor import Descriptor
from .errors import (
    ClosedError,
    IntegrityError,
    ManifestError,
    MissingFileError,
    PathError,
    TruncatedError,
)
from .location import open_location, read_head
from .manifest import MANIFEST_NAME

_MAX_OPEN_FILES = 64
_MAX_DEPTH = 32


class Store(Protocol):
    """Named files of bytes, lying at `location`. Thread-safe; `with` closes it.

    Once it is closed every method but `close` raises `ClosedError`; reads that run then end
    as if it were open.
    """

    location: str
    #: Whether its bytes are on this machine; what is not had better be read only when needed.
    local: bool = True

    def size(self, path: str) -> int:
        """The file's length in bytes. Raises `MissingFileError`."""
        ...

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises `MissingFileError`, or `TruncatedError` where the file ends too early.
        """
        ...

    def read(self, path: str, *, limit: int) -> bytes:
        """The whole of a small file; `IntegrityError`, and nothing read, if it is over `limit`."""
        ...

    def paths(self) -> Iterable[str]:
        """Everything that lies in the package and is not a folder, in sorted order.

        Names that begin with a dot are left out: no package path can have one. Raises
        `ManifestError` where folders are nested too deeply, `IntegrityError` on a read error.
        """
        ...

    def close(self) -> None:
        """Release what is open, now or when the reads that run are done."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_store(location: str | os.PathLike[str]) -> Store:
    """A folder's or a zip file's store, told apart by what is there.

    Raises `LocationError` when nothing is there, `ManifestError` when it is neither.
    """
    from .zip_store import ZipStore

    head = read_head(location, 4)
    if head is None:
        return DirectoryStore(location)
    if head == b"PK\x03\x04":
        return ZipStore(location)
    inside = Path(location).name == MANIFEST_NAME
    raise ManifestError(
        f"{os.fspath(location)}: expected a package folder or an uncompressed zip, found a file"
        f" that begins with {head.hex(' ') or 'nothing'}",
        hint="Give the folder that it lies in." if inside else None,
    )


class DirectoryStore(Store):
    """A package in a folder; nothing outside the folder can be reached through it.

    Each part of a path is opened relative to the folder above it without following links,
    so neither a symlink nor one swapped in between check and open leads out. Only regular
    files are read. The folder itself may be reached through links: the caller named it.
    Raises `LocationError` if it cannot be opened.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.location = os.fspath(root)
        self._root = Descriptor(open_location(root, os.O_DIRECTORY), self.location)
        self._files = _OpenFiles(self.open_file, self.location)

    def size(self, path: str) -> int:
        """See `Store.size`."""
        with self._files.use(path) as fd:
            return os.fstat(fd).st_size

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`."""
        # Written out: a small expert is read as fast as a `with` of a generator is run.
        file, fd = self._files.acquire(path)
        try:
            read_exactly(fd, offset, buffer, path)
        finally:
            file.release()

    def read(self, path: str, *, limit: int) -> bytes:
        """See `Store.read`."""
        with self._files.use(path) as fd:
            return read_whole(fd, 0, os.fstat(fd).st_size, path, limit)

    def paths(self) -> Iterable[str]:
        """See `Store.paths`."""
        try:
            with self._root.use() as root:
                return sorted(_walk(root, self.location))
        except OSError as error:
            raise IntegrityError(f"{self.location}: cannot be listed: {error.strerror}") from error

    def open_extent(self, path: str, flags: int = 0) -> tuple[int, int, int]:
        """(descriptor, offset, length) of the file, for readers with their own way to read.

        `flags` are added to the open flags (`os.O_DIRECT`). The caller closes the descriptor.
        Raises `MissingFileError`, or `OSError` where the file system refuses the flags.
        """
        fd = self.open_file(path, flags)
        return fd, 0, os.fstat(fd).st_size

    def open_file(self, path: str, flags: int = 0) -> int:
        """A contained, read-only descriptor of the regular file `path`; the caller closes it."""
        parts = _parts(path)
        with self._root.use() as root:
            fd = _open_below(root, parts, flags, path)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise MissingFileError(f"{path}: expected a regular file, found something else")
        return fd

    def close(self) -> None:
        """See `Store.close`."""
        self._files.close()
        self._root.close()


def read_exactly(fd: int, offset: int, buffer: memoryview, path: str) -> None:
    """Fill `buffer` from `offset` of a descriptor, however short the single reads are."""
    view = rest = buffer.cast("B")
    done = 0
    while rest:
        try:
            count = os.preadv(fd, [rest], offset + done)
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror} at byte {offset + done}") from error
        if count == 0:
            raise TruncatedError(
                f"{path}: expected {len(view)} bytes from {offset}, found {done}",
                hint="The file is shorter than the manifest says: fetch or copy it again.",
            )
        done += count
        rest = view[done:]


def read_whole(fd: int, offset: int, size: int, path: str, limit: int) -> bytes:
    """`size` bytes from `offset`; `IntegrityError` before anything is read when over `limit`."""
    if size > limit:
        raise IntegrityError(f"{path}: expected at most {limit:,} bytes, found {size:,}")
    data = bytearray(size)
    read_exactly(fd, offset, memoryview(data), path)
    return bytes(data)


class _OpenFiles:
    """A bounded cache of open descriptors; one in use is never closed under its reader.

    `_lock` guards all fields. A descriptor is taken into use under it, so that none can be
    closed between being found and being used.
    """

    def __init__(self, opener: Callable[[str], int], location: str) -> None:
        self._opener = opener
        self._location = location
        self._lock = threading.Lock()
        self._files: OrderedDict[str, Descriptor] = OrderedDict()
        self._closed = False

    @contextmanager
    def use(self, path: str) -> Iterator[int]:
        file, fd = self.acquire(path)
        try:
            yield fd
        finally:
            file.release()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()

    def acquire(self, path: str) -> tuple[Descriptor, int]:
        """The file, to be released once, and its number until then."""
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._location}: the package is closed")
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = Descriptor(self._opener(path), self._location)
                if len(self._files) > _MAX_OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            else:
                self._files.move_to_end(path)
            return file, file.acquire()


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts) or len(parts) > _MAX_DEPTH:
        raise PathError(f"{path!r}: expected a relative path inside the package")
    return parts


def _open_below(root: int, parts: list[str], flags: int, path: str) -> int:
    *folders, name = parts
    parent = root
    try:
        for folder in folders:
            below = _open_at(parent, folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, path)
            if parent != root:
                os.close(parent)
            parent = below
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        return _open_at(parent, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | flags, path)
    finally:
        if parent != root:
            os.close(parent)


def _open_at(parent: int, name: str, flags: int, path: str) -> int:
    try:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        # O_NOFOLLOW gives ELOOP for a link to a file, ENOTDIR for one to a folder.
        if error.errno == errno.ELOOP:
            raise MissingFileError(f"{path}: {name!r} is a symlink; packages have none") from None
        if error.errno == errno.ENOTDIR:
            raise MissingFileError(
                f"{path}: {name!r}: expected a folder, found a symlink or a file"
            ) from None
        if error.errno == errno.EINVAL and flags & getattr(os, "O_DIRECT", 0):
            raise
        raise MissingFileError(
            f"{path}: {error.strerror}",
            hint="The package is not whole: fetch or copy it again. `evermind-pack validate` lists "
            "all that is missing.",
        ) from error


def _walk(root: int, location: str) -> Iterator[str]:
    pending: list[tuple[str, ...]] = [()]
    while pending:
        parts = pending.pop()
        if len(parts) >= _MAX_DEPTH:
            raise ManifestError(f"{location}: folders are nested more than {_MAX_DEPTH} deep")
        fd = os.dup(root)
        try:
            for part in parts:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((*parts, entry.name))
                    else:
                        yield "/".join((*parts, entry.name))
        finally:
            os.close(fd)
