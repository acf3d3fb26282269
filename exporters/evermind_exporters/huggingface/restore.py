"""The way back: the checkpoint that a package was imported from, tensor by tensor.

The package's map (`evermind_manifests.source_map`) says where the bits of each tensor lie. They
are written as they come into files of the same names with the same tensors in the same order;
of a tensor in many shards only as much is held as one expert's part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests import dtypes
from evermind_manifests.dtypes import ITEMSIZE, STORAGE
from evermind_manifests.errors import ConfigError, DigestError, ExportError, ManifestError
from evermind_manifests.manifest import DType, TensorSpec
from evermind_manifests.package import Package, digest_error
from evermind_manifests.safetensors_header import (
    PREFIX_BYTES,
    SAFETENSORS_DTYPES,
    TensorRange,
    header_bytes,
    read_header,
)
from evermind_manifests.source_map import (
    ShardPart,
    SourceFile,
    SourceMap,
    SourceTensor,
    parse_source,
    source_problems,
)
from evermind_manifests.staging import Staging

from .checkpoint import is_plain
from .documents import DOCUMENTS_FOLDER, SHARED
from .misfits import CONFIG_NAME, INDEX_NAME

Progress: TypeAlias = Callable[[int, int], None]

_BLOCK: Final = 16 << 20
# Stored as the first, each value of the second comes back bit by bit.
_EXACT: Final[frozenset[tuple[DType, DType]]] = frozenset({("f32", "f16"), ("f32", "bf16")})


class Written(NamedTuple):
    """One file: its length and sha256."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Restored:
    """What was written, by file; and which tensors are `rounded`: as the package stores them."""

    files: dict[str, Written]
    tensors: int
    rounded: tuple[str, ...]


def restore_checkpoint(
    package: Package,
    destination: Path,
    *,
    lossy: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Write the folder that `package` was imported from: weights, config, tokenizer.

    Every tensor is the checkpoint's, bit by bit. A package that does not hold them so (experts
    or trunk rounded by the import's `dtype` or `trunk`) is refused, unless `lossy`; one of a
    quantised checkpoint is always. `progress(done, total)` counts bytes. Raises `ConfigError` for
    a package that has no way back, `ExportError` where the folder exists or cannot be written,
    `IntegrityError` for a damaged package; then nothing is left behind.
    """
    if os.path.lexists(destination):
        raise ExportError(
            f"{destination}: exists already", hint="Choose another name, or remove it."
        )
    source = _Source(package)
    rounded = source.rounded()
    if rounded and not lossy:
        raise ConfigError(
            f"{package.location}: {len(rounded):,} of {len(source.map.tensors):,} tensors were "
            f"rounded by the import, {rounded[0]} among them",
            hint="Import with --dtype keep for a way back bit by bit, or give --lossy.",
        )
    staging = Staging(destination, overwrite=False)
    staging.claim_empty()
    try:
        done, files = 0, {}
        coarse = frozenset(rounded)
        total = source.bytes()

        def told(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done, total)

        for name, file in source.map.files.items():
            header = _header(source, file, coarse)
            chunks = (chunk for one in file.tensors for chunk in source.chunks(one, one in coarse))
            files[name] = _write(staging, name, header, chunks, told)
        for name, data in _documents(package, source.map).items():
            files[name] = _write(staging, name, data, iter(()), told)
        staging.publish(staging.folder)
    except BaseException:
        staging.discard()
        raise
    return Restored(files, len(source.map.tensors), rounded)


class _Source:
    """A package's tensors as its map describes them, checked before they are used."""

    def __init__(self, package: Package) -> None:
        manifest = package.manifest
        if manifest.source is None:
            raise ConfigError(
                f"{package.location}: family: expected a model imported from a Hugging Face "
                f"checkpoint with the way back to it, found {manifest.family!r} without",
                hint="Import the checkpoint again.",
            )
        self._package = package
        self.map = parse_source(package.read_file(manifest.source), manifest.source)
        self._resident = _tensors(package, manifest.resident)
        self._kept = _tensors(package, self.map.kept)
        problems = [
            *source_problems(self.map, manifest, self._resident, self._kept),
            *(
                f"files[{name!r}]: expected a name that ends in .safetensors"
                for name in self.map.files
                if not is_plain(name)
            ),
        ]
        if problems:
            raise ManifestError(f"{manifest.source}: {problems[0]}")
        self._shards = _Shards(package)

    def _stored(self, name: str) -> DType:
        """What the package stores a tensor as."""
        one = self.map.tensors[name]
        if one.kept:
            return one.dtype
        if one.resident:
            found = {self._resident[part].dtype for part in one.resident}
        else:
            found = {self._shards.spec(part).dtype for part in one.shards}
        if len(found) != 1:
            raise ManifestError(f"tensors[{name!r}]: expected one dtype, found {sorted(found)}")
        return found.pop()

    def rounded(self) -> tuple[str, ...]:
        """The names of tensors that are stored with less than their bits.

        Raises `ConfigError` if some are not stored at all.
        """
        missing = [
            name
            for name, one in self.map.tensors.items()
            if not (one.kept or one.resident or one.shards)
        ]
        if missing:
            raise ConfigError(
                f"{self._package.location}: {len(missing):,} of {len(self.map.tensors):,} tensors "
                f"of the checkpoint are not in the package, {missing[0]} among them",
                hint="It was quantised: the package has the numbers that its codes stand for.",
            )
        return tuple(
            name
            for name, one in self.map.tensors.items()
            if (stored := self._stored(name)) != one.dtype and (stored, one.dtype) not in _EXACT
        )

    def dtype(self, name: str, *, rounded: bool) -> DType:
        """What a tensor is written as: its own dtype, or, `rounded`, the package's."""
        return self._stored(name) if rounded else self.map.tensors[name].dtype

    def bytes(self) -> int:
        """Of all tensors, as they were."""
        return sum(ITEMSIZE[one.dtype] * math.prod(one.shape) for one in self.map.tensors.values())

    def chunks(self, name: str, rounded: bool) -> Iterator[memoryview]:
        """A tensor's bytes, in order."""
        one = self.map.tensors[name]
        wanted = self.dtype(name, rounded=rounded)
        for data, dtype in self._pieces(name, one):
            yield data if dtype == wanted else _narrowed(data, dtype, wanted, name)

    def _pieces(self, name: str, one: SourceTensor) -> Iterator[tuple[memoryview, DType]]:
        if one.kept:
            assert self.map.kept is not None, "source_problems"
            yield from self._blocks(self.map.kept, self._kept[name])
        for tensor in one.resident:
            assert self._package.manifest.resident is not None, "source_problems"
            yield from self._blocks(self._package.manifest.resident, self._resident[tensor])
        for begin, end, parts in _slabs(one):
            dtype = self._shards.spec(parts[0]).dtype
            slab = np.zeros((end - begin, *one.shape[1:]), STORAGE[dtype])
            for part in parts:
                at = [span.slice for span in part.at]
                if at:
                    at[0] = slice(at[0].start - begin, at[0].stop - begin, at[0].step)
                place = slab[tuple(at)] if at else slab
                place[...] = self._shards.array(part).reshape(place.shape)
            yield slab.reshape(-1).view(np.uint8).data, dtype

    def _blocks(self, path: str, spec: TensorRange) -> Iterator[tuple[memoryview, DType]]:
        for begin in range(spec.begin, spec.end, _BLOCK):
            block = memoryview(bytearray(min(_BLOCK, spec.end - begin)))
            self._package.store.read_into(path, begin, block)
            yield block, spec.dtype


class _Shards:
    """One shard's tensors at a time; each shard is verified when it is first read."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._verified: set[tuple[int, int]] = set()
        self._last: tuple[tuple[int, int], Any] | None = None

    def spec(self, part: ShardPart) -> TensorSpec:
        _, kind = self._package.kind_of(part.layer)
        return next(one for one in kind.tensors if one.name == part.tensor)

    def array(self, part: ShardPart) -> npt.NDArray[Any]:
        """The part as it is stored, its matrices turned back."""
        spec = self.spec(part)
        data = np.frombuffer(self._read(part, spec), STORAGE[spec.dtype]).reshape(spec.shape)
        return data.swapaxes(-1, -2) if part.transposed and data.ndim > 1 else data

    def _read(self, part: ShardPart, spec: TensorSpec) -> memoryview:
        place = part.layer, part.expert
        if self._last is not None and self._last[0] == place:
            view: memoryview = self._last[1].views[part.tensor]
            return view
        if place in self._verified:
            shard = self._package.shard(*place)
            data = memoryview(bytearray(spec.bytes))
            self._package.store.read_into(shard.file, shard.offset + spec.offset, data)
            return data
        self._last = place, self._package.read_shard(*place)
        self._verified.add(place)
        return self._read(part, spec)


def _slabs(one: SourceTensor) -> list[tuple[int, int, list[ShardPart]]]:
    """The parts by rows `(begin, end)` of the first dimension that they fill; or all together."""
    if not one.shards:
        return []
    whole = [(0, one.shape[0] if one.shape else 1, list(one.shards))]
    if not all(part.at for part in one.shards):
        return whole
    ordered = sorted(one.shards, key=lambda part: (part.at[0].begin, part.at[0].end))
    groups = [(span, list(parts)) for span, parts in groupby(ordered, key=lambda part: part.at[0])]
    position = 0
    for span, _ in groups:
        if span.begin != position or span.step != 1:
            return whole
        position = span.end
    if position != one.shape[0]:
        return whole
    return [(span.begin, span.end, parts) for span, parts in groups]


def _narrowed(data: memoryview, dtype: DType, wanted: DType, name: str) -> memoryview:
    """Values that were widened, in their own dtype again."""
    values = dtypes.decode(data, dtype, (len(data) // ITEMSIZE[dtype],))
    stored = dtypes.encode(values, wanted)
    back = dtypes.decode(stored.view(np.uint8), wanted, values.shape)
    if not np.array_equal(back.view(np.uint32), values.view(np.uint32)):
        raise ManifestError(
            f"{name}: expected values that {wanted} holds, found others in {dtype}",
            hint="The map does not fit the weights: import the checkpoint again.",
        )
    return stored.view(np.uint8).data


def _tensors(package: Package, path: str | None) -> dict[str, TensorRange]:
    """A file's header, once its digest is the manifest's."""
    if path is None:
        return {}
    entry = package.manifest.files.get(path)
    if entry is None:
        raise ManifestError(f"{path}: not a file of this package")
    found = hashlib.sha256()
    for begin in range(0, entry.bytes, _BLOCK):
        block = bytearray(min(_BLOCK, entry.bytes - begin))
        package.store.read_into(path, begin, memoryview(block))
        found.update(block)
    if found.hexdigest() != entry.sha256:
        raise digest_error(
            entry.sha256,
            found.hexdigest(),
            path,
            f"files[{path!r}]",
            DigestError,
            package.location,
        )
    prefix = bytearray(min(PREFIX_BYTES, entry.bytes))
    package.store.read_into(path, 0, memoryview(prefix))
    head = bytearray(header_bytes(bytes(prefix), entry.bytes, path))
    package.store.read_into(path, 0, memoryview(head))
    return read_header(bytes(head), path, size=entry.bytes)


def _header(source: _Source, file: SourceFile, rounded: Collection[str]) -> bytes:
    """A safetensors file's head: the length of the JSON, and it, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": file.metadata} if file.metadata else {}
    position = 0
    for name in file.tensors:
        dtype = source.dtype(name, rounded=name in rounded)
        shape = source.map.tensors[name].shape
        end = position + ITEMSIZE[dtype] * math.prod(shape)
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(
    staging: Staging,
    name: str,
    head: bytes,
    chunks: Iterator[memoryview],
    told: Callable[[int], None],
) -> Written:
    digest, size = hashlib.sha256(head), len(head)
    path = staging.folder / name
    with staging.disk(0):
        path.parent.mkdir(exist_ok=True, parents=True)
        file = path.open("xb")
    with file:
        with staging.disk(len(head)):
            file.write(head)
        for chunk in chunks:
            with staging.disk(chunk.nbytes):
                file.write(chunk)
            digest.update(chunk)
            size += chunk.nbytes
            told(chunk.nbytes)
        with staging.disk(0):
            file.flush()
    return Written(size, digest.hexdigest())


def _documents(package: Package, source: SourceMap) -> dict[str, bytes]:
    """Every file but weights: as the checkpoint had it where the package keeps it so."""
    config = json.dumps(package.manifest.config, indent=2, ensure_ascii=False) + "\n"
    found = {CONFIG_NAME: config.encode()}
    files = package.manifest.files
    found |= {
        name: package.read_file(name)
        for name in SHARED
        if name in files and name not in source.made
    }
    # The checkpoint's own, where the package has changed one for its use.
    found |= {
        path.removeprefix(DOCUMENTS_FOLDER): package.read_file(path)
        for path in files
        if path.startswith(DOCUMENTS_FOLDER)
    }
    if source.index is not None or len(source.files) > 1:
        places = {name: file for file, one in source.files.items() for name in one.tensors}
        index = {"metadata": source.index or {}, "weight_map": places}
        found[INDEX_NAME] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return found
