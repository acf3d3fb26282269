"""Where packages are copied to; a folder here, servers in `http_target.py` and its like."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from evermind_manifests.destination import check_outside_packages, is_package
from evermind_manifests.errors import EvermindPackError, ExportError, LocationError
from evermind_manifests.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    FileEntry,
    Manifest,
    package_digest,
    parse_manifest,
)

from ..stores.disk_cache import Part, WrongDigestError
from ..stores.options import RemoteOptions
from ..stores.urls import HTTP_SCHEMES, is_url, parse_location
from .source import Source

# Hidden, so no package can have a file there.
_SCRATCH: Final = ".evermind-partial"
_BLOCK = 1 << 20


class Target(Protocol):
    """A place for one package. `holds` and `put` may be called by several threads."""

    location: str

    def prepare(self, manifest: Manifest, digest: str) -> None:
        """Look at what is there. Called first."""
        ...

    def holds(self, path: str, entry: FileEntry) -> bool:
        """Whether this content is there already."""
        ...

    def put(self, path: str, entry: FileEntry, source: Source) -> None:
        """Bring a file there, checked. Raises `DigestError`, or `Interrupted` from the source."""
        ...

    def finish(self, manifest: bytes, signature: bytes | None) -> None:
        """Write the manifest: the package is complete."""
        ...

    def close(self) -> None:
        """Let go of the place, finished or not. Called last."""
        ...


def open_target(location: str, options: RemoteOptions) -> Target:
    """A folder, a web server that takes PUT, or an object store.

    Raises `LocationError` for what cannot be copied to, `MissingExtraError`.
    """
    if not is_url(location):
        return FolderTarget(Path(location))
    url = parse_location(location)
    if not url.is_folder:
        raise LocationError(f"{url.shown}: packages are copied to folders, not into a .zip")
    if url.scheme in HTTP_SCHEMES:
        from .http_target import HttpTarget

        return HttpTarget(url, options)
    from .object_target import ObjectTarget

    return ObjectTarget(url, options)


class FolderTarget(Target):
    """A folder of this machine; an existing package in it is turned into the new one.

    Files arrive in a hidden folder and are renamed when they are whole, checked and synced.
    The old manifest goes first and the new one comes last, so what lies there is never
    taken for a package it is not.
    """

    def __init__(self, root: Path) -> None:
        self.location = str(root)
        self._root = root
        self._scratch = root / _SCRATCH
        self._replaced = self._scratch / "replaced.json"
        self._lock = -1
        self._names: set[str] = set()

    def prepare(self, manifest: Manifest, digest: str) -> None:
        """See `Target.prepare`. Raises `ExportError` for a folder that is no package's,
        `InputError` for one inside another package."""
        root = self._root
        check_outside_packages(root)
        if root.suffix == ".zip":
            raise ExportError(f"{root}: expected a folder, found the name of a single file")
        if root.is_symlink() or (root.exists() and not root.is_dir()):
            raise ExportError(f"{root}: expected a folder")
        ours = self._scratch.is_dir() or is_package(root)
        if root.is_dir() and any(root.iterdir()) and not ours:
            raise ExportError(
                f"{root}: expected a package or an empty folder, found something else",
                hint="Choose another name.",
            )
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"{root}: cannot be written: {error.strerror}") from error
        self._take_lock()
        self._names = {MANIFEST_NAME, SIGNATURE_NAME, *manifest.files}
        current = root / MANIFEST_NAME
        if current.is_file() and package_digest(current.read_bytes()) != digest:
            current.rename(self._replaced)

    def holds(self, path: str, entry: FileEntry) -> bool:
        """See `Target.holds`: the file is hashed."""
        place = self._place(path)
        if place.is_symlink() or not place.is_file() or place.stat().st_size != entry.bytes:
            return False
        digest = hashlib.sha256()
        with place.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest() == entry.sha256

    def put(self, path: str, entry: FileEntry, source: Source) -> None:
        """See `Target.put`; goes on from what an earlier copy left."""
        # By content, so that a new version never goes on from an old one's bytes; and by
        # path, as two files may have the same content.
        name = hashlib.sha256(f"{entry.sha256} {path}".encode()).hexdigest()
        scratch = self._scratch / f"{name}.part"
        fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        part = Part(entry.sha256, entry.bytes, scratch, fd)
        try:
            part.fill(lambda begin, sink: source.stream(path, begin, sink))
            os.fsync(fd)
            place = self._place(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            scratch.rename(place)
        except WrongDigestError as error:
            part.discard()
            raise source.mismatch(path, error.found) from None
        finally:
            part.close()

    def finish(self, manifest: bytes, signature: bytes | None) -> None:
        """See `Target.finish`. Files that only the replaced package named are removed."""
        for path in self._left_over():
            with suppress(OSError):
                self._place(path).unlink()
        if signature is None:
            (self._root / SIGNATURE_NAME).unlink(missing_ok=True)
        else:
            self._write(SIGNATURE_NAME, signature)
        folders = {self._place(path).parent for path in self._names}
        for folder in sorted(folders):
            if folder.is_dir():
                _sync(folder)
        self._write(MANIFEST_NAME, manifest)
        shutil.rmtree(self._scratch, ignore_errors=True)
        _sync(self._root)

    def close(self) -> None:
        """See `Target.close`; what arrived stays for the next copy."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _left_over(self) -> set[str]:
        try:
            data = self._replaced.read_bytes()[:MAX_MANIFEST_BYTES]
            old = parse_manifest(data)
        except (OSError, EvermindPackError):
            return set()
        return old.files.keys() - self._names

    def _write(self, name: str, data: bytes) -> None:
        scratch = self._scratch / name
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(self._root / name)

    def _place(self, path: str) -> Path:
        """Where a file lies. Raises `ExportError` if a link leads out of the folder."""
        place = self._root
        for part in path.split("/")[:-1]:
            place = place / part
            if place.is_symlink():
                raise ExportError(f"{place}: expected a folder, found a symlink")
        return self._root / path

    def _take_lock(self) -> None:
        self._lock = os.open(self._scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ExportError(f"{self._root}: another copy to it is running") from None


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
