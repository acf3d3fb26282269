"""A package's files as streams, wherever they lie."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

from evermind_manifests.errors import DigestError, MissingFileError
from evermind_manifests.manifest import SIGNATURE_NAME, FileEntry
from evermind_manifests.package import Package, digest_error

from ..stores.cached import CachedStore
from ..stores.remote import Sink

_BLOCK = 1 << 20
_MAX_SIGNATURE_BYTES = 1 << 20


class Interrupted(Exception):  # noqa: N818
    """Somebody asked the copy to stop."""


class Source:
    """Reads the files of a package; `stopped` is asked at every block."""

    def __init__(self, package: Package, stopped: Callable[[], bool]) -> None:
        self.package = package
        self._stopped = stopped

    def stream(self, path: str, begin: int, sink: Sink) -> None:
        """The file from byte `begin` on, unchecked. Raises `Interrupted`."""
        size = self.package.manifest.files[path].bytes

        def guarded(chunk: bytes | memoryview) -> None:
            sink(chunk)  # what is here is kept, even if it is the last
            if self._stopped():
                raise Interrupted

        store = self.package.store
        if isinstance(store, CachedStore):
            # What is not in the cache passes by: a copy is no reason to keep it twice.
            store.pass_through(path, begin, guarded)
            return
        buffer = memoryview(bytearray(min(_BLOCK, size - begin)))
        while begin < size:
            view = buffer[: size - begin]
            store.read_into(path, begin, view)
            guarded(view)
            begin += len(view)

    def check(self, path: str) -> FileEntry:
        """Hash the file. Raises `DigestError` if it is not what the manifest says."""
        entry = self.package.manifest.files[path]
        digest = hashlib.sha256()
        self.stream(path, 0, digest.update)
        if digest.hexdigest() != entry.sha256:
            raise self.mismatch(path, digest.hexdigest())
        return entry

    def mismatch(self, path: str, found: str) -> DigestError:
        """The error of a file with another content."""
        expected, location = self.package.manifest.files[path].sha256, self.package.location
        return digest_error(expected, found, path, f"files[{path!r}]", DigestError, location)

    def signature(self) -> bytes | None:
        """The package's detached signature, if it has one."""
        try:
            return self.package.store.read(SIGNATURE_NAME, limit=_MAX_SIGNATURE_BYTES)
        except MissingFileError:
            return None

    def open(self, path: str) -> io.BufferedReader:
        """The file as a readable, seekable file object."""
        return io.BufferedReader(_File(self, path), _BLOCK)


class _File(io.RawIOBase):
    """Positioned reads of one file, as a file object."""

    def __init__(self, source: Source, path: str) -> None:
        self._source = source
        self._path = path
        self._size = source.package.manifest.files[path].bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: object) -> int:
        if self._source._stopped():
            raise Interrupted
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        view = view[: max(0, self._size - self._at)]
        if len(view):
            self._source.package.store.read_into(self._path, self._at, view)
            self._at += len(view)
        return len(view)
