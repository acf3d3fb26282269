"""source.json of an imported model: where its package has the bits of each of the checkpoint's
tensors, and a file for those that it has nowhere else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from evermind_manifests.dtypes import tensor_bytes
from evermind_manifests.manifest import Layer
from evermind_manifests.shard import Buffer
from evermind_manifests.source_map import (
    KEPT_NAME,
    SOURCE_FORMAT,
    ShardPart,
    SourceFile,
    SourceMap,
    SourceTensor,
    Span,
)

from ..resident import Stored, TensorFile
from .checkpoint import Checkpoint, Rows
from .expert_map import ExpertRows
from .trunk import LARGE


def kept_tensors(
    checkpoint: Checkpoint,
    places: Mapping[str, tuple[str, ...]],
    experts: Sequence[Sequence[ExpertRows]],
) -> dict[str, Stored]:
    """What of a checkpoint is in no shard and not resident, and so is kept for the way back.

    Not quantized weights: their numbers are in the package, their codes and scales are not.
    """
    placed = {rows.name for layer in experts for held in layer for rows in held.values()}
    whole = set(checkpoint.names) - placed - places.keys()
    return {
        name: Stored(spec.dtype, spec.shape)
        for _, header in checkpoint.headers()
        for name, spec in header.tensors.items()
        if name in whole and not spec.foreign
    }


def source_map(
    checkpoint: Checkpoint,
    places: Mapping[str, tuple[str, ...]],
    layers: Sequence[Layer],
    experts: Sequence[Sequence[ExpertRows]],
    made: tuple[str, ...],
) -> SourceMap:
    """The map; `places` are the resident tensors that have a checkpoint's (`Trunk.places`),
    `made` what files are not the checkpoint's (`made_files`).
    """
    kept = kept_tensors(checkpoint, places, experts)
    parts: defaultdict[str, list[ShardPart]] = defaultdict(list)
    for layer, rows_of in zip(layers, experts, strict=True):
        for expert, held in enumerate(rows_of):
            for tensor, rows in held.items():
                at = _spans(rows, checkpoint.shape(rows.name))
                parts[rows.name].append(
                    ShardPart(
                        layer=layer.layer,
                        expert=expert,
                        tensor=tensor,
                        at=at,
                        transposed=rows.transposed,
                    )
                )
    whole = set(checkpoint.names)
    tensors: dict[str, SourceTensor] = {}
    files: dict[str, SourceFile] = {}
    for file, header in checkpoint.headers():
        files[file] = SourceFile(tensors=tuple(header.tensors), metadata=header.metadata)
        for name, spec in header.tensors.items():
            lost = bool(spec.foreign) or name not in whole
            tensors[name] = SourceTensor(
                dtype=spec.dtype,
                shape=spec.shape,
                resident=() if lost else places.get(name, ()),
                shards=() if lost else tuple(parts.get(name, ())),
                kept=name in kept,
            )
    return SourceMap(
        format=SOURCE_FORMAT,
        files=files,
        tensors=tensors,
        made=made,
        kept=KEPT_NAME if kept else None,
        index=checkpoint.index_metadata(),
    )


def kept_notes(source: SourceMap) -> list[str]:
    """A sentence on what lies in the package for the way back alone, if anything does."""
    kept = {name: one for name, one in source.tensors.items() if one.kept}
    if not kept:
        return []
    size = sum(tensor_bytes(one.dtype, one.shape) for one in kept.values())
    names = ", ".join(sorted(kept)[:3]) + (", …" if len(kept) > 3 else "")
    return [
        f"{len(kept):,} tensors ({size:,} bytes) that the model uses in another form or not at all "
        f"are carried for `convert --to hf` alone: {names}"
    ]


def kept_file(source: SourceMap) -> TensorFile:
    """The file for what the map says is kept."""
    return TensorFile(
        {name: Stored(one.dtype, one.shape) for name, one in source.tensors.items() if one.kept}
    )


def kept_reader(checkpoint: Checkpoint) -> Callable[[str], Iterator[Buffer]]:
    """What gives a checkpoint's tensor by name, a block at a time."""

    def read(name: str) -> Iterator[Buffer]:
        size = math.prod(checkpoint.shape(name))
        for begin in range(0, size, LARGE):
            block = checkpoint.values(name, begin, min(begin + LARGE, size))
            yield block.view(np.uint8).data

    return read


def _spans(rows: Rows, shape: tuple[int, ...]) -> tuple[Span, ...]:
    """The slice that `rows` are of a tensor of this shape; none where they are all of it."""
    if rows.expert is None:
        spans = []
    elif rows.height is None:
        spans = [Span(rows.expert, rows.expert + 1)]
    else:
        spans = [Span(rows.expert * rows.height, (rows.expert + 1) * rows.height)]
    if rows.transposed:
        if rows.expert is None:
            spans.append(Span(0, shape[0]))
        elif rows.height is None:
            spans.append(Span(0, shape[1]))
        spans.append(Span(rows.begin, rows.end))
    elif rows.height is not None:
        first = spans.pop().begin
        spans.append(Span(first + rows.begin, first + rows.end))
    else:
        spans.append(Span(rows.begin, rows.end))
    while spans and spans[-1] == Span(0, shape[len(spans) - 1]):
        spans.pop()
    return tuple(spans)
