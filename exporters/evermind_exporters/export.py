"""Write one model as a package: round the weights, build the graphs, stream the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
    Generation,
    Kind,
    Layer,
    Manifest,
    Parameters,
    Tokenizer,
)
from evermind_manifests.shard import encode_shard
from evermind_manifests.writer import PackageWriter

from .blueprint import Blueprint, FamilyExporter, FloatArray
from .checkpoints import parameter_count
from .families import FAMILIES
from .parity import PARITY_NAME, Reference, parity_file
from .peer_tokenizer import TOKENIZER_NAME
from .resident import pack_resident
from .source import ModelSource

ExpertDType: TypeAlias = Literal["f32", "f16", "bf16"]
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to write a package.

    `dtype` is what expert weights are stored as. Resident weights stay float32, except that
    `rounding="truncate"` (f16 only) cuts every weight to half precision the way the peer
    does, so that the package computes exactly the peer's half model. What `name`, `version`,
    `card` and `created` leave open comes from the source.
    """

    dtype: ExpertDType = "f16"
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
    has none. `progress(done, total)` counts shards. Raises `ExportError` when a weight does
    not fit `dtype` or the destination cannot be written; then nothing is left behind.
    """
    options = options or ExportOptions()
    if options.rounding == "truncate" and options.dtype != "f16":
        raise ConfigError(
            f"rounding 'truncate' is the peer's half precision and needs dtype f16, "
            f"not {options.dtype}"
        )
    with PackageWriter(destination, layout=options.layout, overwrite=options.overwrite) as writer:
        draft = draft_package(source, options, reference)
        for path, data in draft.files.items():
            writer.add_file(path, data)
        _add_shards(writer, draft.blueprint, source, options, progress)
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
    stored = StoredTensors(source, family, options)
    resident, index = pack_resident(
        {name: stored[name] for name in family.resident_names(source.config)}
    )
    blueprint = family.build(source.config, index, options.dtype)
    files = {**source.attachments, **blueprint.graphs, RESIDENT_NAME: resident}
    kinds = _kinds(blueprint, files)
    tokenizer = None
    if source.tokenizer == "bytes":
        tokenizer = Tokenizer(kind="bytes")
    elif source.tokenizer is not None:
        files[TOKENIZER_NAME] = source.tokenizer
        tokenizer = Tokenizer(kind="tokenizers", file=TOKENIZER_NAME)
    if reference is not None:
        files[PARITY_NAME] = parity_file(family, source.config, stored, reference)
    card = merge_cards(source.card, options.card)
    manifest = Manifest(
        schema=SCHEMA,
        name=options.name or source.name,
        version=options.version or source.version,
        family=family.name,
        config=source.config,
        parameters=Parameters(
            total=parameter_count(family.name, source.config),
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


def merge_cards(below: Card, above: Card) -> Card:
    """`below` with every field that `above` says something in taken from there."""
    said = {name: value for name in Card.__struct_fields__ if (value := getattr(above, name))}
    return msgspec.structs.replace(below, **said)


class StoredTensors(Mapping[str, FloatArray]):
    """The model's weights as a reader of the package sees them: rounded, then float32 again."""

    def __init__(self, source: ModelSource, family: FamilyExporter, options: ExportOptions) -> None:
        self._source = source.tensors
        self._resident = frozenset(family.resident_names(source.config))
        self._options = options

    def __getitem__(self, name: str) -> FloatArray:
        array = self._source[name]
        if name in self._resident and self._options.rounding != "truncate":
            return array
        stored = _encode(name, array, self._options)
        return dtypes.decode(stored.data, self._options.dtype, array.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def _encode(name: str, array: FloatArray, options: ExportOptions) -> np.ndarray[Any, Any]:
    try:
        return dtypes.encode(array, options.dtype, options.rounding)
    except ExportError as error:
        raise ExportError(
            f"{name}: {error.message}", hint="Export with --dtype bf16 or --dtype f32 instead."
        ) from error


def _kinds(blueprint: Blueprint, files: dict[str, bytes]) -> dict[str, Kind]:
    """The manifest's kinds; their graphs are added to `files`."""
    kinds = {}
    for name, kind in blueprint.kinds.items():
        graph, external = f"graphs/expert_{name}.onnx", f"graphs/expert_{name}_external.onnx"
        files[graph] = kind.graph
        files[external] = kind.graph_external
        kinds[name] = Kind(
            graph=graph,
            graph_external=external,
            tensors=kind.layout.tensors,
            bytes=kind.layout.bytes,
        )
    return kinds


def _add_shards(
    writer: PackageWriter,
    blueprint: Blueprint,
    source: ModelSource,
    options: ExportOptions,
    progress: Progress | None,
) -> None:
    """Encode each shard on a second thread while the one before it is hashed and written."""
    experts = [(layer, expert) for layer in blueprint.layers for expert in range(layer.experts)]

    def encode(layer: Layer, expert: int) -> bytes:
        names = FAMILIES[source.family].expert_names(layer.layer, expert)
        arrays = {
            tensor: _encode(name, source.tensors[name], options) for tensor, name in names.items()
        }
        return encode_shard(blueprint.kinds[layer.kind].layout, layer.layer, expert, arrays)

    with ThreadPoolExecutor(max_workers=1) as encoder:
        ahead = [encoder.submit(encode, *key) for key in experts[:1]]
        for number, (layer, expert) in enumerate(experts, 1):
            data = ahead.pop().result()
            ahead += [encoder.submit(encode, *key) for key in experts[number : number + 1]]
            writer.add_shard(layer.layer, expert, data)
            if progress:
                progress(number, len(experts))
