"""Write a package: files and shards as they come, the manifest last, all or nothing.

The bytes depend on what is added and on nothing else. Everything is written into a
scratch folder beside the destination (`staging.py`), synced, and renamed at the end; an
error, Ctrl-C or a forgotten `finish` leaves nothing behind. A writer that is `resumable`
notes which shards are on the disk (`journal.py`), and goes on from there when it was cut off.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self, TypeAlias

import msgspec

from .card import render_card
from .errors import ContentError, EvermindPackError, ExportError, ManifestError
from .journal import JOURNAL_NAME, Journal, read_journal
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
from .output import Block, Output
from .paths import check_file_kind, check_path
from .problems import raise_errors
from .shard import Buffer, align, read_header
from .staging import Staging, unfinished
from .structure import POOL_ALIGNMENT, check_structure
from .zip_writer import write_zip

if TYPE_CHECKING:
    from hashlib import _Hash

Layout: TypeAlias = Literal["files", "pool"]
Progress: TypeAlias = Callable[[int, int], None]

POOL_BYTES: Final = 1 << 30
# A writer that is killed loses at most so many bytes of shards.
JOURNAL_BYTES: Final = 64 << 20

_ZIP_NAME = "package.zip"


class PackageWriter:
    """Writes one package to `destination`: a folder, or one file if the name ends in `.zip`.

    With `layout="files"` each shard is a file; with `"pool"` shards lie 4 KiB-aligned in
    files of about 1 GiB. Nothing that was added is held in memory. Use it in a `with`;
    call `finish` last. Raises `ExportError` where the package cannot be written, also for
    an existing destination unless `overwrite`.

    With `resumable`, call `resume` before anything is added. Whatever cuts it off then leaves
    its shards behind, in the hidden folder beside the destination; but for a `ContentError`.
    """

    def __init__(
        self,
        destination: Path,
        *,
        layout: Layout = "files",
        overwrite: bool = False,
        resumable: bool = False,
    ) -> None:
        self._staging = Staging(Path(destination), overwrite=overwrite)
        self._layout = layout
        self._files: dict[str, FileEntry] = {}
        self._shards: dict[tuple[int, int], Shard] = {}
        self._outputs: list[Output] = []  # being written to
        self._pool: Output | None = None  # the one of them that takes the next shards
        self._pools = 0
        self._open = False
        self._hashers = ThreadPoolExecutor(2)
        self._spare: list[Block] = []  # for outputs
        self._resumable = resumable
        self._journal: Journal | None = None
        self._unsynced: list[Shard] = []
        self._unsynced_bytes = 0
        self._reopening = False

    def resume(
        self, key: Mapping[str, str], *, restart: bool = False, progress: Progress | None = None
    ) -> frozenset[tuple[int, int]]:
        """The shards `(layer, expert)` that a writer before completed: they need not be added.

        `key` is all that shards depend on, in words: with another key, what was left is
        another's. Every shard is read and hashed; those that are damaged are gone, in pools
        those after them too. `progress(done, total)` counts bytes. `restart` removes what was
        left. Raises `ExportError` if it is another's.
        """
        assert self._open, "a writer resumes in its `with` statement"
        assert self._resumable, "this writer was made not to resume"
        folder = self._staging.folder
        found = None if restart else read_journal(folder)
        if found is not None and found.key != dict(key):
            raise self._foreign(found.key, key)
        self._take_over(found.shards if found else [], progress)
        kept = {*(one.file for one in self._shards.values()), *(one.path for one in self._outputs)}
        self._staging.clear(keep={JOURNAL_NAME, *kept})
        self._journal = Journal(folder)
        with self._staging.disk(0):
            self._journal.begin(key, self._shards.values())
        return frozenset(self._shards)

    @property
    def destination(self) -> Path:
        """Where the package will be."""
        return self._staging.destination

    @property
    def shard_bytes(self) -> int:
        """How many bytes all shards have so far."""
        return sum(one.bytes for one in self._shards.values())

    def add_file(self, path: str, data: Buffer) -> None:
        """Add one file. Raises `PathError` or `UnsupportedError` for a path no package may have."""
        self.stream_file(path, (data,))

    def stream_file(self, path: str, parts: Iterable[Buffer]) -> None:
        """Add one file in parts, of which one is held at a time; raises like `add_file`."""
        check_path(path)
        check_file_kind(path)
        output = self._open_output(path)
        for part in parts:
            self._put(output, part)
        self._close(output)

    def add_shard(self, layer: int, expert: int, data: Buffer) -> None:
        """Add one expert's shard, as `encode_shard` made it; otherwise like `stream_shard`."""
        self.stream_shard(layer, expert, (data,), memoryview(data).nbytes)

    def stream_shard(self, layer: int, expert: int, parts: Iterable[Buffer], size: int) -> None:
        """Add one expert's shard of `size` bytes in parts, the first of which holds the header.

        Only one part is held at a time. Raises `ShardError` if it is not the shard of this
        layer and expert, `ExportError` if the parts have another length together.
        """
        if (layer, expert) in self._shards:
            raise ExportError(f"layer {layer} expert {expert} was added twice")
        where = f"layer {layer} expert {expert}"
        rest = iter(parts)
        first = next(rest, b"")
        header = read_header(first, size, where)
        if (header.layer, header.expert) != (layer, expert):
            raise ExportError(
                f"{where}: the shard is of layer {header.layer} expert {header.expert}"
            )
        output = self._shard_file(layer, expert, size)
        begin = output.position
        # A file of its own has the shard's digest: nothing is hashed twice.
        alone = hashlib.sha256() if self._layout == "pool" else None
        for part in chain((first,), rest):
            self._put(output, part, alone)
        if output.position - begin != size:
            raise ExportError(
                f"{where}: expected {size:,} bytes, found {output.position - begin:,}"
            )
        if self._layout == "files":
            self._close(output)
        else:
            self._flush(output)
        shard = self._shards[layer, expert] = Shard(
            layer=layer,
            expert=expert,
            file=output.path,
            offset=begin,
            bytes=size,
            sha256=alone.hexdigest() if alone else output.entry.sha256,
        )
        if self._journal is not None:
            self._unsynced.append(shard)
            self._unsynced_bytes += size
            if self._unsynced_bytes >= JOURNAL_BYTES:
                self._note_shards(self._journal)

    def finish(self, manifest: Manifest, check: Callable[[Path], None] | None = None) -> str:
        """Write the model card and the manifest, publish the package, and give its digest.

        `files` and `shards` of `manifest` are replaced by what was written. A README.md
        that was added is kept. `check` gets the finished folder before it takes the
        destination's place, which it does not if `check` raises. Raises `ManifestError`
        naming what contradicts itself.
        """
        if self._pool is not None:
            self._close(self._pool)
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
        if check is not None:
            check(self._staging.folder)
        self._publish()
        return package_digest(data)

    def __enter__(self) -> Self:
        if self._resumable:
            self._staging.claim()
        else:
            self._staging.claim_empty()
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hashers.shutdown()
        for output in self._outputs:
            with suppress(OSError):
                output.close()
        if self._open:
            self._open = False
            if error is not None and self._resumable and self._left_to_resume(error):
                self._staging.leave()
            else:
                self._staging.discard()

    def _left_to_resume(self, error: BaseException) -> bool:
        """Whether shards stay: they are on the disk, and nothing says that they are wrong."""
        if self._journal is not None:
            if isinstance(error, ContentError):
                return False
            with suppress(OSError, ExportError):
                self._note_shards(self._journal)
        left = unfinished(self._staging.destination)
        if left is not None and isinstance(error, EvermindPackError):
            kept = f"{left.shards:,} experts are kept in {left.folder.name}"
            if self._staging.failed:
                error.hint = f"{kept}: free some space, and the same command goes on from there."
            elif self._journal is not None:
                more = f"{kept}: the same command goes on from there."
                error.hint = f"{error.hint} {more}" if error.hint else more
        return left is not None

    def _take_over(self, shards: Sequence[Shard], progress: Progress | None) -> None:
        """Make written shards this writer's own, in order, if they are as they were written."""
        last = {(one.layer, one.expert): one for one in shards}
        done, total = 0, sum(one.bytes for one in last.values())
        self._reopening = True
        for shard in last.values():
            if not self._take_shard(shard) and self._layout == "pool":
                break  # those after it do not lie where they would be written now
            done += shard.bytes
            if progress:
                progress(done, total)
        self._reopening = False
        if self._pool is not None:
            self._cut(self._pool)

    def _take_shard(self, shard: Shard) -> bool:
        if not (self._staging.folder / shard.file).is_file():
            return False
        output = self._shard_file(shard.layer, shard.expert, shard.bytes)
        at_place = (output.path, output.position) == (shard.file, shard.offset)
        taken = at_place and output.take(shard)
        if taken:
            self._shards[shard.layer, shard.expert] = shard
        if output is not self._pool:
            self._close(output)
            if not taken:
                del self._files[output.path]
        return taken

    def _note_shards(self, journal: Journal) -> None:
        if self._unsynced:
            with self._staging.disk(0):
                journal.add(self._unsynced)
            self._unsynced.clear()
            self._unsynced_bytes = 0

    def _foreign(self, found: Mapping[str, str], key: Mapping[str, str]) -> ExportError:
        names = [name for name in sorted({*found, *key}) if found.get(name) != key.get(name)]
        differing = ", ".join(
            f"{name} (then {found.get(name, 'none')}, now {key.get(name, 'none')})"
            for name in names
        )
        return ExportError(
            f"{self._staging.folder}: an unfinished import of something else is there: it differs "
            f"in {differing}",
            hint="Give the same source and options to finish it, or --restart to start anew.",
        )

    def _write(self, path: str, data: Buffer) -> None:
        output = self._open_output(path)
        self._put(output, data)
        self._close(output)

    def _open_output(self, path: str) -> Output:
        if path in self._files:
            raise ExportError(f"{path}: was added twice")
        with self._staging.disk(0):
            output = Output(path, self._create(path), self._hashers, self._spare)
        self._outputs.append(output)
        return output

    def _put(self, output: Output, data: Buffer, alone: _Hash | None = None) -> None:
        with self._staging.disk(memoryview(data).nbytes):
            output.write(data, alone)

    def _flush(self, output: Output) -> None:
        self._staging.written -= output.held
        with self._staging.disk(output.held):
            output.flush()

    def _cut(self, output: Output) -> None:
        """Drop what another writer put after the shards that are taken over."""
        with self._staging.disk(0):
            output.cut()

    def _close(self, output: Output) -> None:
        if self._reopening:
            self._cut(output)
        self._flush(output)
        with self._staging.disk(0):
            output.close()
        self._files[output.path] = output.entry
        self._outputs.remove(output)

    def _create(self, path: str) -> FileIO:
        assert self._open, "PackageWriter is used in a `with` statement, and finished once"
        target = self._staging.folder / path
        if self._reopening:
            fd = os.open(target, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            return open(fd, "r+b", buffering=0)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb", buffering=0)

    def _shard_file(self, layer: int, expert: int, size: int) -> Output:
        """Where the next shard goes: a file of its own, the current pool, or a new one."""
        if self._layout == "files":
            return self._open_output(f"experts/l{layer:03d}/e{expert:04d}.moe0")
        pool = self._pool
        if pool is not None and align(pool.position, POOL_ALIGNMENT) + size > POOL_BYTES:
            self._close(pool)
            pool = self._pool = None
        if pool is None:
            pool = self._pool = self._open_output(f"experts/pool-{self._pools:03d}.moe0p")
            self._pools += 1
        self._put(pool, bytes(align(pool.position, POOL_ALIGNMENT) - pool.position))
        return pool

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
