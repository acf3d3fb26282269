"""The deep level of validation: read every byte that the manifest describes.

Each file is hashed; shards are read strictly and compared with the manifest, graphs and
the resident header are parsed and checked against the plan. Memory stays at one shard or
one block, whichever is larger.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from .dtypes import count_nonfinite
from .errors import (
    EvermindPackError,
    GraphError,
    IntegrityError,
    ManifestError,
    ShardError,
    TruncatedError,
)
from .graph import MAX_GRAPH_BYTES, GraphInfo, graph_problems, inspect_graph
from .interface import external_locations, interface_problems
from .manifest import Manifest, Shard
from .package import read_shard_bytes, shard_place
from .problems import Problem, problem, problem_of
from .safetensors_header import PREFIX_BYTES, TensorRange, header_bytes, read_header
from .shard import check_shard, read_shard
from .source_map import MAX_SOURCE_BYTES, parse_source, source_problems
from .store import Store

_BLOCK = 4 * 1024 * 1024


def deep_problems(
    store: Store, manifest: Manifest, progress: Callable[[int, int], None]
) -> list[Problem]:
    """What is wrong with the bytes of the package; sizes are the files level's business."""
    return _Deep(store, manifest, progress).check()


class _Deep:
    """One walk over a package; collects what the interface check needs."""

    def __init__(
        self, store: Store, manifest: Manifest, progress: Callable[[int, int], None]
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._progress = progress
        self._total = sum(entry.bytes for entry in manifest.files.values())
        self._done = 0
        self._block = memoryview(bytearray(_BLOCK))
        self._kinds = {entry.layer: entry.kind for entry in manifest.layers}
        self._graphs: dict[str, GraphInfo] = {}
        self._resident: Mapping[str, TensorRange] | None = None

    def check(self) -> list[Problem]:
        manifest = self._manifest
        shards: defaultdict[str, list[Shard]] = defaultdict(list)
        for shard in manifest.shards:
            shards[shard.file].append(shard)
        problems: list[Problem] = []
        for path in manifest.files:
            problems += self._check_file(path)
            for shard in shards.get(path, ()):
                problems += self._check_shard(shard)
            if path.endswith(".onnx"):
                problems += self._check_graph(path)
            if path == manifest.resident:
                problems += self._check_resident(path)
        problems += interface_problems(manifest, self._graphs, self._resident)
        problems += self._check_source()
        return problems

    def _check_file(self, path: str) -> Iterator[Problem]:
        entry = self._manifest.files[path]
        try:
            # Another size is reported already; hashing it would only say so again.
            if self._store.size(path) != entry.bytes:
                return
            found = self._hash(path, entry.bytes)
        except EvermindPackError as error:
            if not isinstance(error, FileNotFoundError):
                yield problem_of("unreadable", path, error)
            return
        if found != entry.sha256:
            yield problem(
                "digest-mismatch", path, f"sha256: expected {entry.sha256}, found {found}"
            )

    def _check_shard(self, shard: Shard) -> Iterator[Problem]:
        place = shard_place(shard)
        kind_name = self._kinds.get(shard.layer)
        kind = self._manifest.kinds.get(kind_name) if kind_name is not None else None
        try:
            data = read_shard_bytes(self._store, shard)
        except EvermindPackError as error:
            if not isinstance(error, FileNotFoundError):
                yield problem_of("shard-content", place, error)
            return
        found = hashlib.sha256(data).hexdigest()
        if found != shard.sha256:
            yield problem(
                "digest-mismatch",
                f"{place} (layer {shard.layer} expert {shard.expert})",
                f"sha256: expected {shard.sha256}, found {found}",
            )
        try:
            contents = read_shard(data, place)
            if kind is not None:
                check_shard(contents, kind, shard, place, kind_name=kind_name)
        except (ShardError, TruncatedError) as error:
            yield problem_of("shard-content", place, error)
            return
        for spec in contents.header.tensors:
            count = count_nonfinite(contents.views[spec.name], spec.dtype)
            if count:
                yield _non_finite(f"{place}: tensor {spec.name}", count)

    def _check_graph(self, path: str) -> Iterator[Problem]:
        try:
            info = inspect_graph(self._store.read(path, limit=MAX_GRAPH_BYTES), path)
        except GraphError as error:
            yield problem_of("graph-invalid", path, error)
            return
        except EvermindPackError:
            return  # it is missing or cannot be read: reported with the file
        self._graphs[path] = info
        yield from graph_problems(info, path, external=external_locations(self._manifest, path))

    def _check_resident(self, path: str) -> Iterator[Problem]:
        try:
            tensors = self._tensors(path)
            self._resident = tensors
            for name, tensor in tensors.items():
                count = sum(
                    count_nonfinite(block, tensor.dtype)
                    for block in self._blocks(path, tensor.begin, tensor.end)
                )
                if count:
                    yield _non_finite(f"{path}: tensor {name!r}", count)
        except IntegrityError as error:
            if not isinstance(error, FileNotFoundError):
                yield problem_of("resident-header", path, error)

    def _check_source(self) -> Iterator[Problem]:
        path = self._manifest.source
        if path is None:
            return
        try:
            source = parse_source(self._store.read(path, limit=MAX_SOURCE_BYTES), path)
            if source.kept is not None and source.kept not in self._manifest.files:
                yield problem(
                    "unlisted-file", f"{path}: kept", f"{source.kept!r} is not in `files`"
                )
                return
            kept = {} if source.kept is None else self._tensors(source.kept)
        except (ManifestError, IntegrityError) as error:
            if not isinstance(error, FileNotFoundError):
                yield problem_of("source-map", path, error)
            return
        for message in source_problems(source, self._manifest, self._resident or {}, kept):
            yield problem("source-map", path, message)

    def _tensors(self, path: str) -> dict[str, TensorRange]:
        size = self._store.size(path)
        prefix = bytearray(min(size, PREFIX_BYTES))
        self._store.read_into(path, 0, memoryview(prefix))
        head = bytearray(header_bytes(bytes(prefix), size, path))
        self._store.read_into(path, 0, memoryview(head))
        return read_header(bytes(head), path, size=size)

    def _hash(self, path: str, size: int) -> str:
        digest = hashlib.sha256()
        for block in self._blocks(path, 0, size):
            digest.update(block)
            self._done += len(block)
            self._progress(self._done, self._total)
        return digest.hexdigest()

    def _blocks(self, path: str, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes of a range, at most 4 MiB at a time; a block is valid until the next."""
        for offset in range(begin, end, _BLOCK):
            block = self._block[: min(_BLOCK, end - offset)]
            self._store.read_into(path, offset, block)
            yield block


def _non_finite(place: str, count: int) -> Problem:
    return problem("non-finite", place, f"{count:,} values are infinite or NaN")
