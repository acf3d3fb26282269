"""Write a package: files and shards as they come, the manifest last, all or nothing.

The bytes depend on what is added and on nothing else. Everything is written into a
scratch folder beside the destination (`staging.py`), synced, and renamed at the end; an
error, Ctrl-C or a forgotten `finish` leaves nothing behind.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Literal, Self, TypeAlias

import msgspec

from .card import render_card
from .errors import ExportError, ManifestError
from .manifest import (
    CARD_NAME,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Shard,
    encode_manifest,
    package_digest,
    parse_manifest,
)
from .paths import check_file_kind, check_path
from .problems import raise_errors
from .shard import align, read_header
from .staging import Staging, start_writeback
from .structure import POOL_ALIGNMENT, check_structure
from .zip_writer import write_zip

Layout: TypeAlias = Literal["files", "pool"]

POOL_BYTES: Final = 1 << 30
_WRITEBACK_BYTES: Final = 1 << 20

_ZIP_NAME = "package.zip"


class PackageWriter:
    """Writes one package to `destination`: a folder, or one file if the name ends in `.zip`.

    With `layout="files"` each shard is a file; with `"pool"` shards lie 4 KiB-aligned in
    files of about 1 GiB. No more than one shard is held in memory. Use it in a `with`;
    call `finish` last. Raises `ExportError` where the package cannot be written, also for
    an existing destination unless `overwrite`.
    """

    def __init__(
        self, destination: Path, *, layout: Layout = "files", overwrite: bool = False
    ) -> None:
        self._staging = Staging(Path(destination), overwrite=overwrite)
        self._layout = layout
        self._files: dict[str, FileEntry] = {}
        self._shards: dict[tuple[int, int], Shard] = {}
        self._pool: _Pool | None = None
        self._pools = 0
        self._open = False

    def add_file(self, path: str, data: bytes | bytearray | memoryview) -> None:
        """Add one file. Raises `PathError` or `UnsupportedError` for a path no package may have."""
        check_path(path)
        check_file_kind(path)
        self._write(path, data)

    def add_shard(self, layer: int, expert: int, data: bytes | bytearray | memoryview) -> None:
        """Add one expert's shard, as `encode_shard` made it.

        Raises `ShardError` if it is not the shard of this layer and expert.
        """
        if (layer, expert) in self._shards:
            raise ExportError(f"layer {layer} expert {expert} was added twice")
        size = memoryview(data).nbytes
        header = read_header(data, size, f"layer {layer} expert {expert}")
        if (header.layer, header.expert) != (layer, expert):
            raise ExportError(
                f"layer {layer} expert {expert}: the shard is of layer {header.layer}"
                f" expert {header.expert}"
            )
        if self._layout == "files":
            file, offset = f"experts/l{layer:03d}/e{expert:04d}.moe0", 0
            digest = self._write(file, data).sha256
        else:
            file, offset = self._append(data, size)
            digest = hashlib.sha256(data).hexdigest()
        self._shards[layer, expert] = Shard(
            layer=layer, expert=expert, file=file, offset=offset, bytes=size, sha256=digest
        )

    def finish(self, manifest: Manifest) -> str:
        """Write the model card and the manifest, publish the package, and give its digest.

        `files` and `shards` of `manifest` are replaced by what was written. A README.md
        that was added is kept. Raises `ManifestError` naming what contradicts itself.
        """
        self._close_pool()
        shards = tuple(self._shards[key] for key in sorted(self._shards))
        manifest = msgspec.structs.replace(manifest, files=dict(self._files), shards=shards)
        if CARD_NAME not in self._files:
            self._write(CARD_NAME, render_card(manifest).encode())
            manifest = msgspec.structs.replace(manifest, files=dict(self._files))
        data = encode_manifest(manifest)
        # Structs do not check what they are made of; a reader does.
        parsed = parse_manifest(data)
        where = f"{self._staging.destination}: {MANIFEST_NAME}"
        raise_errors(check_structure(parsed), where, ManifestError)
        self._write(MANIFEST_NAME, data)
        self._publish()
        return package_digest(data)

    def __enter__(self) -> Self:
        self._staging.claim()
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            # Closing flushes, and fails again where writing did.
            with suppress(OSError):
                self._pool.file.close()
        if self._open:
            self._open = False
            self._staging.discard()

    def _write(self, path: str, data: bytes | bytearray | memoryview) -> FileEntry:
        if path in self._files:
            raise ExportError(f"{path}: was added twice")
        entry = FileEntry(bytes=memoryview(data).nbytes, sha256=hashlib.sha256(data).hexdigest())
        with self._staging.disk(entry.bytes), self._create(path) as file:
            file.write(data)
            if entry.bytes >= _WRITEBACK_BYTES:
                file.flush()
                start_writeback(file.fileno())
        self._files[path] = entry
        return entry

    def _create(self, path: str) -> BinaryIO:
        assert self._open, "PackageWriter is used in a `with` statement, and finished once"
        target = self._staging.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")

    def _append(self, data: bytes | bytearray | memoryview, size: int) -> tuple[str, int]:
        """Add a shard to the current pool, or to a new one when it is full."""
        pool = self._pool
        if pool is not None and align(pool.position, POOL_ALIGNMENT) + size > POOL_BYTES:
            self._close_pool()
            pool = None
        if pool is None:
            path = f"experts/pool-{self._pools:03d}.moe0p"
            with self._staging.disk(0):
                pool = self._pool = _Pool(path, self._create(path))
            self._pools += 1
        offset = align(pool.position, POOL_ALIGNMENT)
        with self._staging.disk(offset - pool.position + size):
            pool.write(bytes(offset - pool.position))
            pool.write(data)
        return pool.path, offset

    def _close_pool(self) -> None:
        if self._pool is None:
            return
        with self._staging.disk(0):
            self._pool.file.close()
        self._files[self._pool.path] = FileEntry(
            bytes=self._pool.position, sha256=self._pool.digest.hexdigest()
        )
        self._pool = None

    def _publish(self) -> None:
        staging = self._staging
        content = staging.folder
        if staging.destination.suffix == ".zip":
            content = staging.folder / _ZIP_NAME
            names = [MANIFEST_NAME, *sorted(self._files.keys() - {MANIFEST_NAME})]
            with staging.disk(0):
                write_zip(staging.folder, names, content)
        staging.publish(content)
        self._open = False


class _Pool:
    """A pool file being written; flushed at each shard, so that a full disk shows there."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.position = 0
        self.digest = hashlib.sha256()
        self._written_back = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.file.write(data)
        self.file.flush()
        self.digest.update(data)
        self.position += memoryview(data).nbytes
        if self.position - self._written_back >= _WRITEBACK_BYTES:
            start_writeback(self.file.fileno())
            self._written_back = self.position
