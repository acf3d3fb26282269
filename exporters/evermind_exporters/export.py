"""Write one model as a package: round the weights, build the graphs, stream the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from evermind_manifests import dtypes
from evermind_manifests.errors import ConfigError, ExportError
from evermind_manifests.manifest import (
    RESIDENT_NAME,
    SCHEMA,
    Card,
    DType,
    Generation,
    Kind,
    Layer,
    Manifest,
    Parameters,
    Tokenizer,
)
from evermind_manifests.shard import Buffer, ShardLayout, encode_shard, shard_parts
from evermind_manifests.writer import PackageWriter

from .ahead import one_ahead
from .blueprint import Blueprint, FloatArray, KindBlueprint
from .families import FAMILIES
from .family import Arrays, ModelFamily
from .parity import PARITY_NAME, Reference, parity_file
from .peer_tokenizer import TOKENIZER_NAME
from .resident import pack_resident
from .source import ModelSource

# From here on a shard is handed to the writer tensor by tensor, not whole.
_WHOLE_SHARD_BYTES = 1 << 20
# Parts go from thread to thread in batches of so many bytes at least.
_BATCH_BYTES = 4 << 20

Progress: TypeAlias = Callable[[int, int], None]
#: A shard's (layer, expert), and all of its bytes or the next of them.
ShardPart: TypeAlias = tuple[tuple[int, int], Buffer]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to write a package.

    `dtype` is what expert weights are stored as, one of the family's `storages` or (None) the
    first of them: f16, bf16 or f32 everywhere but for ternary models. Resident weights stay
    float32, except that `rounding="truncate"` (f16 only) cuts every weight to half precision
    the way the peer does, so that the package computes exactly the peer's half model. What
    `name`, `version`, `card` and `created` leave open comes from the source.
    """

    dtype: str | None = None
    rounding: dtypes.Rounding = "nearest"
    layout: Literal["files", "pool"] = "files"
    name: str | None = None
    version: str | None = None
    card: Card = field(default_factory=Card)
    generation: Generation | None = None
    created: str | None = None
    overwrite: bool = False


def export_package(
    source: ModelSource,
    destination: Path,
    options: ExportOptions | None = None,
    *,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> str:
    """Write `source` to `destination` (a folder, or one file if it ends in `.zip`).

    Returns the package digest. `reference` computes the parity case; without it the package
    has none. `progress(done, total)` counts bytes of shards. Raises `ExportError` when a weight is
    not finite or does not fit `dtype`, or the destination cannot be written; then nothing is
    left behind.
    """
    options = options or ExportOptions()
    with PackageWriter(destination, layout=options.layout, overwrite=options.overwrite) as writer:
        draft = draft_package(source, options, reference)
        source = replace(source, config=draft.manifest.config)
        for path, data in draft.files.items():
            writer.add_file(path, data)
        blueprint = draft.blueprint
        parts = _shard_parts(blueprint, source, options)
        write_shards(writer, parts, blueprint.layers, blueprint.kinds, progress)
        return writer.finish(draft.manifest)


@dataclass(frozen=True, slots=True)
class Draft:
    """A package without its shards: every other file, and the manifest without digests."""

    files: dict[str, bytes]
    manifest: Manifest
    blueprint: Blueprint


def draft_package(
    source: ModelSource, options: ExportOptions, reference: Reference | None = None
) -> Draft:
    """Build the graphs and pack the resident weights; of the experts only the layout is used."""
    family = FAMILIES[source.family]
    config, dtype = family.stored_as(source.config, _storage(family, source.config, options))
    source = replace(source, config=config)
    resident, index = pack_resident(_resident(source, family, options))
    blueprint = family.build(config, index, dtype)
    files = {**source.attachments, **blueprint.graphs, RESIDENT_NAME: resident}
    kinds = add_kinds(blueprint.kinds, files)
    tokenizer = None
    if source.tokenizer == "bytes":
        tokenizer = Tokenizer(kind="bytes")
    elif source.tokenizer is not None:
        files[TOKENIZER_NAME] = source.tokenizer
        tokenizer = Tokenizer(kind="tokenizers", file=TOKENIZER_NAME)
    if reference is not None:
        stored = StoredTensors(source, family, blueprint, options)
        files[PARITY_NAME] = parity_file(family, source.config, stored, reference)
    card = merge_cards(source.card, options.card)
    manifest = Manifest(
        schema=SCHEMA,
        name=options.name or source.name,
        version=options.version or source.version,
        family=family.name,
        config=source.config,
        parameters=Parameters(
            total=family.parameter_count(source.config),
            active=blueprint.active_parameters,
        ),
        files={},
        kinds=kinds,
        layers=blueprint.layers,
        shards=(),
        plan=blueprint.plan,
        resident=RESIDENT_NAME,
        tokenizer=tokenizer,
        generation=options.generation,
        parity=PARITY_NAME if reference is not None else None,
        card=card if card != Card() else None,
        created=options.created or source.created,
    )
    return Draft(files, manifest, blueprint)


def _storage(family: ModelFamily, config: Mapping[str, Any], options: ExportOptions) -> str:
    """What expert weights are stored as. Raises `ConfigError` for what cannot be had."""
    storages = family.storages
    dtype = options.dtype or config.get("storage", storages[0])
    if dtype not in storages:
        raise ConfigError(
            f"dtype: a {family.name!r} model is stored as one of {', '.join(storages)}, "
            f"found {dtype!r}"
        )
    if options.rounding == "truncate" and (dtype != "f16" or storages[0] != "f16"):
        raise ConfigError(
            f"rounding 'truncate' is the peer's half precision and needs dtype f16, not {dtype}, "
            "of a family whose weights may be rounded"
        )
    return dtype


def merge_cards(below: Card, above: Card) -> Card:
    """`below` with every field that `above` says something in taken from there."""
    said = {name: value for name in Card.__struct_fields__ if (value := getattr(above, name))}
    return msgspec.structs.replace(below, **said)


class StoredTensors(Mapping[str, FloatArray]):
    """The model's weights as a reader of the package sees them: rounded, then float32 again.

    What shards hold no copy of is as in the model: resident, or packed by the family.
    """

    def __init__(
        self,
        source: ModelSource,
        family: ModelFamily,
        blueprint: Blueprint,
        options: ExportOptions,
    ) -> None:
        self._source = source.tensors
        self._options = options
        self._dtypes: dict[str, DType] = {}
        for layer in blueprint.layers:
            layout = {spec.name: spec.dtype for spec in blueprint.kinds[layer.kind].layout.tensors}
            for expert in range(layer.experts):
                names = family.expert_names(source.config, layer.layer, expert)
                self._dtypes |= {name: layout[tensor] for tensor, name in names.items()}

    def __getitem__(self, name: str) -> FloatArray:
        array = self._source[name]
        dtype = self._dtypes.get(name, "f32")
        stored = _stored(name, array, dtype, self._options)
        return dtypes.decode(stored, dtype, array.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


class _ShardTensors(Mapping[str, np.ndarray[Any, Any]]):
    """One expert's tensors in storage dtype, each made when it is asked for."""

    def __init__(
        self,
        source: ModelSource,
        layout: ShardLayout,
        names: Mapping[str, str],
        computed: Arrays,
        options: ExportOptions,
    ) -> None:
        self._source = source.tensors
        self._dtypes = {spec.name: spec.dtype for spec in layout.tensors}
        self._names = names
        self._computed = computed
        self._options = options

    def __getitem__(self, tensor: str) -> np.ndarray[Any, Any]:
        name = self._names.get(tensor, tensor)
        array = self._computed[tensor] if tensor in self._computed else self._source[name]
        return _stored(name, array, self._dtypes[tensor], self._options)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._names, *self._computed])

    def __len__(self) -> int:
        return len(self._names) + len(self._computed)


def _resident(source: ModelSource, family: ModelFamily, options: ExportOptions) -> Arrays:
    tensors: Arrays = {name: source.tensors[name] for name in family.resident_names(source.config)}
    tensors |= family.computed_resident(source.config, source.tensors)
    return {
        name: _stored(name, array, "f32", options) if array.dtype == np.float32 else array
        for name, array in tensors.items()
    }


def _stored(
    name: str, array: np.ndarray[Any, Any], dtype: DType, options: ExportOptions
) -> np.ndarray[Any, Any]:
    """`array` in storage dtype; what is not float32 is in it already.

    Raises `ExportError` for weights that are not finite, or do not fit `dtype`.
    """
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum needs no memory; it may overflow where no value is infinite.
        finite = np.isfinite(np.add.reduce(array, axis=None)) or np.isfinite(array).all()
    if not finite:
        bad = array.size - np.count_nonzero(np.isfinite(array))
        raise ExportError(
            f"{name}: expected finite weights, found {bad:,} of {array.size:,} infinite or NaN",
            hint="Take a checkpoint from before the training diverged.",
        )
    try:
        if options.rounding == "truncate" and dtype == "f32":
            return dtypes.decode(dtypes.encode(array, "f16", "truncate").data, "f16", array.shape)
        return dtypes.encode(array, dtype, options.rounding)
    except ExportError as error:
        raise ExportError(
            f"{name}: {error.message}", hint="Export with --dtype bf16 or --dtype f32 instead."
        ) from error


def add_kinds(blueprints: Mapping[str, KindBlueprint], files: dict[str, bytes]) -> dict[str, Kind]:
    """The manifest's kinds; their graphs are added to `files`."""
    kinds = {}
    for name, kind in blueprints.items():
        graph, external = f"graphs/expert_{name}.onnx", f"graphs/expert_{name}_external.onnx"
        files[graph] = kind.graph
        files[external] = kind.graph_external
        statistics = None
        if kind.graph_statistics is not None:
            statistics = f"graphs/expert_{name}_statistics.onnx"
            files[statistics] = kind.graph_statistics
        kinds[name] = Kind(
            graph=graph,
            graph_external=external,
            graph_statistics=statistics,
            tensors=kind.layout.tensors,
            bytes=kind.layout.bytes,
            scope=kind.scope,
        )
    return kinds


def write_shards(
    writer: PackageWriter,
    parts: Iterator[ShardPart],
    layers: Sequence[Layer],
    kinds: Mapping[str, KindBlueprint],
    progress: Progress | None,
) -> None:
    """Make `parts` on a second thread while those before them are hashed and written.

    Shards that the writer has already are not among `parts`.
    """
    ahead = one_ahead(_batches(parts))
    sizes = {layer.layer: kinds[layer.kind].layout.bytes for layer in layers}
    total = sum(layer.experts * sizes[layer.layer] for layer in layers)
    done = writer.shard_bytes
    if progress:
        progress(done, total)
    # Closed at once, also when the disk is full: the thread must not outlive the export.
    with closing(ahead):
        for (layer, expert), group in groupby(chain.from_iterable(ahead), key=itemgetter(0)):
            writer.stream_shard(layer, expert, (part for _, part in group), sizes[layer])
            done += sizes[layer]
            if progress:
                progress(done, total)


def _batches(parts: Iterator[ShardPart]) -> Iterator[list[ShardPart]]:
    """`parts` in order. Each batch but the last has a large part or many small ones.

    The padding between two tensors alone would be all that is made while the first is written.
    """
    batch: list[ShardPart] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += memoryview(part[1]).nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _shard_parts(
    blueprint: Blueprint, source: ModelSource, options: ExportOptions
) -> Iterator[ShardPart]:
    """Every shard's bytes in order, each part under its (layer, expert).

    A part is a whole shard, or one tensor where a shard is large.
    """
    family = FAMILIES[source.family]
    for layer in blueprint.layers:
        layout = blueprint.kinds[layer.kind].layout
        for expert in range(layer.experts):
            place = layer.layer, expert
            names = family.expert_names(source.config, *place)
            computed = family.computed_shard(source.config, source.tensors, *place)
            arrays = _ShardTensors(source, layout, names, computed, options)
            if layout.bytes <= _WHOLE_SHARD_BYTES:
                yield place, encode_shard(layout, *place, arrays)
            else:
                yield from ((place, part) for part in shard_parts(layout, *place, arrays))
