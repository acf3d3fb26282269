"""A peer's file opened as a package: nothing is converted, experts are paged from where they lie.

Graphs, resident weights and manifest are made in memory. An expert's four tensors are one
range of the file; a page-in reads that range straight into the tensors' places of a shard
(one `preadv`), and puts the shard's header before them. So the bytes a reader sees are
those of an exported package, and budgets, digests and graphs are the same too.

Opening reads the whole file once: its own checksums are verified, and every shard's sha256
is taken for the manifest. On one core 100 MB take 0.1 s for `MoE0`, 0.2 s for `EVL0`, and
1.5 s for `.evermind`, whose FNV-1a is slow.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from evermind_manifests.errors import IntegrityError, MissingFileError, TruncatedError
from evermind_manifests.manifest import (
    MANIFEST_NAME,
    RESIDENT_NAME,
    FileEntry,
    Shard,
    encode_manifest,
)
from evermind_manifests.package import Package, open_package
from evermind_manifests.safetensors_header import read_header
from evermind_manifests.shard import ShardLayout, encode_header
from evermind_manifests.store import Store

from .checkpoints.peer_file import PeerFile
from .export import ExportOptions, draft_package
from .families import FAMILIES
from .source import peer_source


def open_peer_file(path: str | os.PathLike[str]) -> Package:
    """The package that a peer's `MoE0`, `EVL0`, `LMBC` or `.evermind` file amounts to.

    Experts are f16 or f32 as the file stores them. Raises `CheckpointError` for a file that
    is malformed or damaged.
    """
    return open_package(PeerStore(path))


@dataclass(frozen=True, slots=True)
class _Virtual:
    """A file of the package that is laid out when read: `fill` writes all its bytes."""

    bytes: int
    fill: Callable[[memoryview], None]


class PeerStore(Store):
    """The package's files: small ones in memory, weights laid out from the peer's file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `CheckpointError` for a file that is malformed or damaged."""
        self._file = PeerFile(path)
        self.location = self._file.location
        self._file.verify()
        source = peer_source(self._file)
        draft = draft_package(source, ExportOptions(dtype=self._file.dtype))
        self._small = dict(draft.files)
        files = {name: _entry(data) for name, data in self._small.items()}
        # The runtime holds the resident weights: a second copy here would double them.
        resident = self._small.pop(RESIDENT_NAME)
        self._virtual = {RESIDENT_NAME: self._virtual_resident(resident)}
        shards = []
        family = FAMILIES[source.family]
        for layer in draft.blueprint.layers:
            layout = draft.blueprint.kinds[layer.kind].layout
            for expert in range(layer.experts):
                names = family.expert_names(source.config, layer.layer, expert)
                first = names[layout.tensors[0].name]
                shard = self._add_shard(layout, layer.layer, expert, self._file.offset(first))
                files[shard.file] = FileEntry(bytes=shard.bytes, sha256=shard.sha256)
                shards.append(shard)
        manifest = msgspec.structs.replace(draft.manifest, files=files, shards=tuple(shards))
        self._small[MANIFEST_NAME] = encode_manifest(manifest)

    def size(self, path: str) -> int:
        """See `Store.size`."""
        self._file.check_open()
        if path in self._virtual:
            return self._virtual[path].bytes
        if path in self._small:
            return len(self._small[path])
        raise MissingFileError(f"{path}: not found in {self.location}")

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`; a whole shard is read without a copy."""
        size = self.size(path)
        if offset < 0 or offset + buffer.nbytes > size:
            raise TruncatedError(
                f"{path}: expected {buffer.nbytes} bytes from {offset}, the file has {size}"
            )
        if path in self._virtual and buffer.nbytes == size:
            self._virtual[path].fill(buffer.cast("B"))
        else:
            data = self.read(path, limit=size)
            buffer.cast("B")[:] = data[offset : offset + buffer.nbytes]

    def read(self, path: str, *, limit: int) -> bytes:
        """See `Store.read`."""
        size = self.size(path)
        if size > limit:
            raise IntegrityError(f"{path}: expected at most {limit:,} bytes, found {size:,}")
        if path in self._small:
            return self._small[path]
        data = bytearray(size)
        self._virtual[path].fill(memoryview(data))
        return bytes(data)

    def paths(self) -> Iterable[str]:
        """See `Store.paths`."""
        self._file.check_open()
        return sorted([*self._small, *self._virtual])

    def close(self) -> None:
        """See `Store.close`."""
        self._file.close()

    def _add_shard(self, layout: ShardLayout, layer: int, expert: int, offset: int) -> Shard:
        """Make a shard of the expert whose tensors lie from `offset` of the file on."""
        head = encode_header(layout, layer, expert)
        fill = partial(self._fill_shard, head, layout, offset)
        path = f"experts/l{layer:03d}/e{expert:04d}.moe0"
        self._virtual[path] = _Virtual(layout.bytes, fill)
        digest = hashlib.sha256(self.read(path, limit=layout.bytes)).hexdigest()
        return Shard(
            layer=layer, expert=expert, file=path, offset=0, bytes=layout.bytes, sha256=digest
        )

    def _fill_shard(
        self, head: bytes, layout: ShardLayout, offset: int, buffer: memoryview
    ) -> None:
        buffer[: len(head)] = head
        end = len(head)
        tensors: list[memoryview] = []
        for spec in layout.tensors:
            buffer[end : spec.offset] = bytes(spec.offset - end)
            end = spec.offset + spec.bytes
            tensors.append(buffer[spec.offset : end])
        buffer[end:] = bytes(len(buffer) - end)
        self._file.read_into(offset, tensors)

    def _virtual_resident(self, packed: bytes) -> _Virtual:
        tensors = read_header(packed, where=RESIDENT_NAME)
        head = packed[: min(tensor.begin for tensor in tensors.values())]
        places = {name: (tensor.begin, tensor.end) for name, tensor in tensors.items()}

        def fill(buffer: memoryview) -> None:
            buffer[: len(head)] = head
            for name, (begin, end) in places.items():
                values = np.ascontiguousarray(self._file.tensors[name], dtype="<f4")
                buffer[begin:end] = values.reshape(-1).view(np.uint8).data

        return _Virtual(len(packed), fill)


def _entry(data: bytes) -> FileEntry:
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
