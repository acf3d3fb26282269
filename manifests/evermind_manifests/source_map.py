"""source.json: where a package holds the bits of the checkpoint that it was imported from.

Every tensor of the checkpoint lies in the resident file, in shards (one whole, or a slice of it
in each), or, where the model uses it in another form or not at all, in a safetensors file of
its own that no graph reads. Whoever wants the checkpoint back needs nothing else. Bits are the
checkpoint's where the stored dtype is; an import that rounds stores another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from .errors import ManifestError
from .manifest import Count, DType, Manifest, Name, PackagePath, PositiveCount, Shape, TensorSpec
from .safetensors_header import TensorRange
from .unique_keys import unique_keys

SOURCE_NAME: Final = "source.json"
KEPT_NAME: Final = "source.safetensors"
SOURCE_FORMAT: Final = "evermind.source/1"
MAX_SOURCE_BYTES: Final = 256 * 1024 * 1024


class Span(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Indices `begin`, `begin + step`, … below `end`, of one dimension: `[begin, end, step]`."""

    begin: Count
    end: PositiveCount
    step: PositiveCount = 1

    def __len__(self) -> int:
        return len(range(self.begin, self.end, self.step))

    def meets(self, other: Span) -> bool:
        """Whether an index is in both."""
        first, last = max(self.begin, other.begin), min(self.end, other.end)
        common = math.gcd(self.step, other.step)
        apart = other.begin - self.begin
        if first >= last or apart % common:
            return False
        # self.begin + turns * self.step is in other's steps too (Chinese remainders).
        turns = apart // common * pow(self.step // common, -1, other.step // common)
        period = self.step // common * other.step
        least = self.begin + turns * self.step
        return first + (least - first) % period < last

    @property
    def slice(self) -> slice:
        """To index an array with."""
        return slice(self.begin, self.end, self.step)


class ShardPart(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one tensor of one shard holds of a checkpoint's tensor.

    `at` has a span for each of the leading dimensions; those after are whole. `transposed`: the
    shard holds that slice's matrices (its last two dimensions) transposed.
    """

    layer: Count
    expert: Count
    tensor: Name
    at: Annotated[tuple[Span, ...], Meta(max_length=16)] = ()
    transposed: bool = False


class SourceTensor(
    Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One tensor of the checkpoint: what it was, and one of the places that hold its bits.

    `resident` names tensors of the resident file, nearly always one, that make up the whole one
    after another along the first dimension. `shards` are slices that do. `kept`: it lies under
    its own name in the file that the map calls `kept`. None of them: the package does not hold it.
    """

    dtype: DType
    shape: Annotated[tuple[Count, ...], Meta(max_length=16)]
    resident: tuple[Name, ...] = ()
    shards: tuple[ShardPart, ...] = ()
    kept: bool = False


class SourceFile(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One safetensors file of the checkpoint: its tensors in their order, and its metadata."""

    tensors: tuple[Name, ...]
    metadata: dict[str, str] = {}


class SourceMap(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The whole of source.json. `index` is the `metadata` of the checkpoint's index file.

    `made` names files of the package that are not the checkpoint's of that name: what that one
    was, if it was, lies in the folder `source/`.
    """

    format: Literal["evermind.source/1"]
    files: dict[Name, SourceFile]
    tensors: dict[Name, SourceTensor]
    made: tuple[Name, ...] = ()
    kept: PackagePath | None = None
    index: dict[str, Any] | None = None


_DECODER = msgspec.json.Decoder(SourceMap)
_ENCODER = msgspec.json.Encoder(order="sorted")


def encode_source(source: SourceMap) -> bytes:
    """The file's bytes."""
    return _ENCODER.encode(source) + b"\n"


def parse_source(data: bytes, where: str = SOURCE_NAME) -> SourceMap:
    """Raises `ManifestError` for what is not a source map: another format, a type, a key twice."""
    try:
        json.loads(data, object_pairs_hook=unique_keys)
        return _DECODER.decode(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: {error}") from error


def source_problems(
    source: SourceMap,
    manifest: Manifest,
    resident: Mapping[str, TensorRange],
    kept: Mapping[str, TensorRange],
) -> Iterator[str]:
    """Sentences on what does not fit the package, with the tensors that its files hold.

    Shapes and dtypes are compared, not bits. A float may be stored in another float's dtype.
    """
    listed = [name for file in source.files.values() for name in file.tensors]
    if len(set(listed)) != len(listed) or set(listed) != set(source.tensors):
        yield "files: expected every tensor in exactly one of them"
    if (source.kept is not None) != any(one.kept for one in source.tensors.values()):
        yield "kept: expected a file where tensors are kept, and only there"
    kinds = {one.layer: manifest.kinds.get(one.kind) for one in manifest.layers}
    experts = {one.layer: one.experts for one in manifest.layers}
    tensors = {
        layer: {spec.name: spec for spec in kind.tensors} for layer, kind in kinds.items() if kind
    }
    for name, one in source.tensors.items():
        place = f"tensors[{name!r}]"
        places = bool(one.resident) + bool(one.shards) + one.kept
        if places > 1:
            yield f"{place}: expected one place, found {places}"
        elif one.resident:
            yield from _resident_problems(place, one, resident)
        elif one.kept:
            found = kept.get(name)
            if found is None or (found.dtype, found.shape) != (one.dtype, one.shape):
                yield f"{place}: expected {one.dtype} {list(one.shape)} in the kept file"
        elif one.shards:
            yield from _part_problems(place, one, experts, tensors)


def _resident_problems(
    place: str, one: SourceTensor, resident: Mapping[str, TensorRange]
) -> Iterator[str]:
    missing = [name for name in one.resident if name not in resident]
    if missing:
        yield f"{place}: the resident file has no tensor {missing[0]!r}"
        return
    shapes = [resident[name].shape for name in one.resident]
    shape = shapes[0]
    if len(shapes) > 1:
        if not all(other and other[1:] == one.shape[1:] for other in shapes):
            yield f"{place}: expected rows of {list(one.shape)}, found {shapes}"
            return
        shape = (sum(other[0] for other in shapes), *one.shape[1:])
    if shape != one.shape:
        yield f"{place}: shape: expected {list(one.shape)}, found {list(shape)}"


def _part_problems(
    place: str,
    one: SourceTensor,
    experts: Mapping[int, int],
    tensors: Mapping[int, Mapping[str, TensorSpec]],
) -> Iterator[str]:
    covered = 0
    for part in one.shards:
        spec = tensors.get(part.layer, {}).get(part.tensor)
        if spec is None or part.expert >= experts[part.layer]:
            yield (
                f"{place}: layer {part.layer} expert {part.expert} has no tensor {part.tensor!r}"
            )
            return
        shape = _part_shape(one.shape, part.at)
        found = spec.shape
        if part.transposed and len(found) > 1:
            found = (*found[:-2], found[-1], found[-2])
        if shape is None or _squeezed(shape) != _squeezed(found):
            yield (
                f"{place}: layer {part.layer} expert {part.expert} {part.tensor}: expected a slice "
                f"of {list(one.shape)} as large as {list(found)}"
            )
            return
        covered += math.prod(shape)
    if covered != math.prod(one.shape):
        yield f"{place}: expected all of {list(one.shape)} in shards, found {covered:,} values"
    elif (both := _overlap(one)) is not None:
        first, second = (f"layer {one.layer} expert {one.expert} {one.tensor}" for one in both)
        yield f"{place}: expected each value in one part, found some in {first} and in {second}"


def _overlap(one: SourceTensor) -> tuple[ShardPart, ShardPart] | None:
    """Two parts with a value in common, if any; parts without, as many as all values, are all."""
    dimensions = max(len(part.at) for part in one.shards)
    boxes = [
        (
            (*part.at, *(Span(0, size) for size in one.shape[len(part.at) : dimensions])),
            part,
        )
        for part in one.shards
    ]
    if not dimensions:
        return (one.shards[0], one.shards[1]) if len(one.shards) > 1 else None
    # Along the dimension with the most different spans few are open at a time.
    along = max(range(dimensions), key=lambda axis: len({box[axis].begin for box, _ in boxes}))
    boxes.sort(key=lambda entry: entry[0][along].begin)
    unended: list[tuple[tuple[Span, ...], ShardPart]] = []
    for box, part in boxes:
        unended = [entry for entry in unended if entry[0][along].end > box[along].begin]
        for other, found in unended:
            if all(mine.meets(theirs) for mine, theirs in zip(box, other, strict=True)):
                return found, part
        unended.append((box, part))
    return None


def _part_shape(shape: Shape, at: tuple[Span, ...]) -> tuple[int, ...] | None:
    if len(at) > len(shape):
        return None
    if any(span.end > size for span, size in zip(at, shape, strict=False)):
        return None
    return (*map(len, at), *shape[len(at) :])


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
