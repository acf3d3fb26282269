"""MoE0 version 3: one expert's weights as one self-describing run of bytes.

    0   u32  magic 0x4D6F4530          8   u32  length n of the header
    4   u32  version 3                12   u32  offset of the first tensor, a multiple of 64
    16  n bytes msgpack {layer, expert, kind, activation, tensors: [[name, dtype, shape,
        offset, bytes], …], extra?}, zero padding, then the tensors, each 64-byte aligned

Integers are little-endian. All shards of one kind have the same layout, so the room for
the header is that of the largest layer and expert number. Source: design.md, section 3.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from .dtypes import STORAGE, decode, tensor_bytes
from .errors import ExportError, ShardError, TruncatedError
from .manifest import Bytes, DType, Kind, Name, Shape, Shard, TensorSpec
from .unique_keys import unique_keys

MAGIC: Final = 0x4D6F4530
VERSION: Final = 3
ALIGNMENT: Final = 64
PREFIX_BYTES: Final = 16
MAX_HEADER_BYTES: Final = 1 << 20
# From here on a shard ends on a page: then it fills what memory a runtime that reads past the
# page cache holds it in, and a budget of k experts is k times its length. Costs 1.6 % at most.
LARGE_BYTES: Final = 256 * 1024
PAGE: Final = 4096

Buffer: TypeAlias = bytes | bytearray | memoryview

_PREFIX = struct.Struct("<4I")
_WIDEST = 2**32 - 1
_MAX_EXTRA_DEPTH = 16


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where every tensor of a kind's shards lies; `bytes` is the length of a whole shard."""

    kind: str
    activation: str
    tensors: tuple[TensorSpec, ...]
    data_offset: int
    bytes: int
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says about itself."""

    layer: int
    expert: int
    kind: str
    activation: str
    tensors: tuple[TensorSpec, ...]
    data_offset: int
    extra: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ShardContents:
    """A checked shard: its header, and `views[name]`, each tensor's bytes in place."""

    header: ShardHeader
    views: Mapping[str, memoryview]

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor `name` in its shape: float32 if it is stored as f16, bf16 or f32."""
        spec = next(spec for spec in self.header.tensors if spec.name == name)
        return decode(self.views[name], spec.dtype, spec.shape)


def plan_shard(
    kind: str,
    activation: str,
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    extra: Mapping[str, Any] | None = None,
) -> ShardLayout:
    """Lay out a kind's shards: tensors in the given order, offsets from the shard's first byte.

    Raises `ExportError` for no tensors, a repeated name, or a header over 1 MiB.
    """
    names = [name for name, _, _ in tensors]
    if not names or len(set(names)) != len(names):
        raise ExportError(f"shard kind {kind!r}: tensor names must be present and differ: {names}")
    if extra is not None:
        _check_extra(extra, f"shard kind {kind!r}", ExportError)
    data_offset = ALIGNMENT
    # The header holds the offsets, whose msgpack width depends on them: grow until it fits.
    while True:
        specs = _place(tensors, data_offset)
        header = _pack_header(_WIDEST, _WIDEST, kind, activation, specs, extra)
        needed = align(PREFIX_BYTES + len(header))
        if needed <= data_offset:
            break
        data_offset = needed
    if len(header) > MAX_HEADER_BYTES:
        raise ExportError(f"shard kind {kind!r}: the header has {len(header):,} bytes, over 1 MiB")
    end = align(specs[-1].offset + specs[-1].bytes)
    if end >= LARGE_BYTES:
        end = align(end, PAGE)
    return ShardLayout(kind, activation, specs, data_offset, end, extra)


def encode_shard(
    layout: ShardLayout, layer: int, expert: int, arrays: Mapping[str, npt.NDArray[Any]]
) -> bytes:
    """The bytes of one shard; see `shard_parts`."""
    return b"".join(shard_parts(layout, layer, expert, arrays))


def shard_parts(
    layout: ShardLayout, layer: int, expert: int, arrays: Mapping[str, npt.NDArray[Any]]
) -> Iterator[Buffer]:
    """The bytes of one shard in parts: the header, then each tensor and the padding before it.

    `arrays` are in storage dtype (`dtypes.encode`) and shape; each is asked for when its turn
    comes, so a lazy mapping need not hold them all. Raises `ExportError` for a missing or
    surplus array, a wrong dtype or a wrong shape.
    """
    place = f"layer {layer} expert {expert}"
    expected = {spec.name for spec in layout.tensors}
    if set(arrays) != expected:
        raise ExportError(f"{place}: expected tensors {sorted(expected)}, found {sorted(arrays)}")
    header = encode_header(layout, layer, expert)
    yield header
    position = len(header)
    for spec in layout.tensors:
        array = arrays[spec.name]
        if array.dtype != STORAGE[spec.dtype] or array.shape != spec.shape:
            raise ExportError(
                f"{place}: tensor {spec.name}: expected {spec.dtype} {list(spec.shape)},"
                f" found {array.dtype} {list(array.shape)}"
            )
        yield bytes(spec.offset - position)
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        position = spec.offset + spec.bytes
    yield bytes(layout.bytes - position)


def encode_header(layout: ShardLayout, layer: int, expert: int) -> bytes:
    """The first bytes of a shard: prefix and header, without the padding before the tensors."""
    header = _pack_header(
        layer, expert, layout.kind, layout.activation, layout.tensors, layout.extra
    )
    return _PREFIX.pack(MAGIC, VERSION, len(header), layout.data_offset) + header


def read_prefix(data: Buffer, size: int, where: str) -> tuple[int, int]:
    """Check a shard's first 16 bytes; give (end of the header, offset of the first tensor).

    `size` is the length of the whole shard. Raises `TruncatedError` or `ShardError`.
    """
    if size < PREFIX_BYTES or len(data) < PREFIX_BYTES:
        raise TruncatedError(f"{where}: expected a shard, found {min(size, len(data))} bytes")
    magic, version, length, data_offset = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ShardError(f"{where}: magic: expected {MAGIC:#010x}, found {magic:#010x}")
    if version != VERSION:
        raise ShardError(f"{where}: version: expected {VERSION}, found {version}")
    if length > MAX_HEADER_BYTES:
        raise ShardError(f"{where}: header: {length:,} bytes, over {MAX_HEADER_BYTES:,}")
    if data_offset % ALIGNMENT or data_offset < PREFIX_BYTES + length:
        raise ShardError(
            f"{where}: first tensor: expected a multiple of {ALIGNMENT} from"
            f" {PREFIX_BYTES + length}, found {data_offset}"
        )
    if data_offset > size:
        raise TruncatedError(f"{where}: the first tensor is at {data_offset}, the end at {size}")
    return PREFIX_BYTES + length, data_offset


def read_header(data: Buffer, size: int, where: str) -> ShardHeader:
    """Parse and check the header of a shard of `size` bytes; `data` holds at least the header.

    Checks what can be checked without the tensors: types, duplicate keys, and that the
    tensors are aligned, in order, inside the shard and of exactly their shape's length.
    Raises `ShardError`, or `TruncatedError` where bytes are missing.
    """
    end, data_offset = read_prefix(data, size, where)
    if len(data) < end:
        raise TruncatedError(f"{where}: header: expected {end} bytes, found {len(data)}")
    raw = _unpack_header(bytes(memoryview(data)[PREFIX_BYTES:end]), where)
    specs = tuple(
        TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape, offset=t.offset, bytes=t.bytes)
        for t in raw.tensors
    )
    problems = check_layout(specs, data_offset, size)
    if problems:
        raise ShardError(f"{where}: {problems[0]}")
    return ShardHeader(
        raw.layer, raw.expert, raw.kind, raw.activation, specs, data_offset, raw.extra
    )


def read_shard(data: Buffer, where: str) -> ShardContents:
    """Read a whole shard strictly; the views point into `data`.

    Besides `read_header`'s checks, every byte outside the header and the tensors must be
    zero. Raises `ShardError`, or `TruncatedError` where bytes are missing.
    """
    view = memoryview(data).cast("B")
    header = read_header(view, len(view), where)
    position, _ = read_prefix(view, len(view), where)
    views: dict[str, memoryview] = {}
    for spec in header.tensors:
        _check_zero(view, position, spec.offset, where)
        position = spec.offset + spec.bytes
        views[spec.name] = view[spec.offset : position]
    _check_zero(view, position, len(view), where)
    if len(view) % ALIGNMENT:
        raise ShardError(f"{where}: length: expected a multiple of {ALIGNMENT}, found {len(view)}")
    return ShardContents(header, views)


def check_shard(
    shard_found: ShardContents | ShardHeader,
    kind: Kind,
    shard: Shard,
    where: str,
    *,
    kind_name: str | None = None,
) -> None:
    """Raise `ShardError` unless the shard is the one the manifest describes.

    A right digest in the wrong slot, or two experts swapped, is found here.
    """
    header = shard_found.header if isinstance(shard_found, ShardContents) else shard_found
    if (header.layer, header.expert) != (shard.layer, shard.expert):
        raise ShardError(
            f"{where}: expected layer {shard.layer} expert {shard.expert},"
            f" found layer {header.layer} expert {header.expert}"
        )
    if kind_name is not None and header.kind != kind_name:
        raise ShardError(f"{where}: kind: expected {kind_name!r}, found {header.kind!r}")
    if header.tensors == kind.tensors:
        return
    for found, expected in zip(header.tensors, kind.tensors, strict=False):
        if found != expected:
            raise ShardError(
                f"{where}: tensor {expected.name}: expected {_describe(expected)} (manifest.json),"
                f" found {found.name} {_describe(found)}"
            )
    raise ShardError(f"{where}: tensors: expected {len(kind.tensors)}, found {len(header.tensors)}")


def check_layout(specs: Sequence[TensorSpec], data_offset: int, size: int) -> list[str]:
    """What is wrong with a tensor layout in a shard of `size` bytes, one sentence each.

    Pure; also used for the layouts a manifest repeats. The first tensor must lie at
    `data_offset` exactly, the others anywhere after their predecessor.
    """
    problems: list[str] = []
    names: set[str] = set()
    position = data_offset
    for number, spec in enumerate(specs):
        place = f"tensor {spec.name}"
        if spec.name in names:
            problems.append(f"{place}: the name stands twice")
        names.add(spec.name)
        needed = tensor_bytes(spec.dtype, spec.shape)
        if spec.bytes != needed:
            problems.append(
                f"{place}: {spec.dtype} {list(spec.shape)} needs {needed} bytes, found {spec.bytes}"
            )
        if spec.offset % ALIGNMENT:
            problems.append(f"{place}: offset {spec.offset} is not a multiple of {ALIGNMENT}")
        if number == 0 and spec.offset != data_offset:
            problems.append(f"{place}: expected offset {data_offset}, found {spec.offset}")
        if spec.offset < position:
            problems.append(f"{place}: offset {spec.offset} overlaps what ends at {position}")
        if spec.offset + spec.bytes > size:
            problems.append(f"{place}: ends at {spec.offset + spec.bytes}, the shard at {size}")
        position = max(position, spec.offset + spec.bytes)
    if not specs:
        problems.append("tensors: there are none")
    return problems


def align(position: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of `alignment` from `position` on."""
    return -(-position // alignment) * alignment


class _RawTensor(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: Name
    dtype: DType
    shape: Shape
    offset: Bytes
    bytes: Bytes


_Ordinal: TypeAlias = Annotated[int, Meta(ge=0, le=_WIDEST)]


class _RawHeader(Struct, frozen=True, forbid_unknown_fields=True):
    layer: _Ordinal
    expert: _Ordinal
    kind: Name
    activation: str
    tensors: tuple[_RawTensor, ...]
    extra: dict[str, Any] = {}


# msgspec looks into a type when it first converts to it. Two threads that did so at once have
# crashed the process, so it is done here, as for all types that threads may meet first.
_KNOWN = msgspec.json.Decoder(_RawHeader)


def _place(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], data_offset: int
) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    offset = data_offset
    for name, dtype, shape in tensors:
        length = tensor_bytes(dtype, shape)
        specs.append(
            TensorSpec(name=name, dtype=dtype, shape=tuple(shape), offset=offset, bytes=length)
        )
        offset = align(offset + length)
    return tuple(specs)


def _pack_header(
    layer: int,
    expert: int,
    kind: str,
    activation: str,
    specs: Sequence[TensorSpec],
    extra: Mapping[str, Any] | None,
) -> bytes:
    header: dict[str, Any] = {
        "layer": layer,
        "expert": expert,
        "kind": kind,
        "activation": activation,
        "tensors": [[s.name, s.dtype, list(s.shape), s.offset, s.bytes] for s in specs],
    }
    if extra:
        header["extra"] = _sorted(extra)
    packed: bytes = msgpack.packb(header)
    return packed


def _sorted(value: Any) -> Any:
    """The same value with every map's keys in order, so that equal content gives equal bytes."""
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value


def _unpack_header(data: bytes, where: str) -> _RawHeader:
    try:
        raw = msgpack.unpackb(
            data, object_pairs_hook=unique_keys, ext_hook=_refuse_ext, strict_map_key=True
        )
        header = msgspec.convert(raw, _RawHeader)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ShardError(f"{where}: header: {error or type(error).__name__}") from error
    _check_extra(header.extra, where, ShardError)
    return header


def _refuse_ext(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")


def _check_extra(
    extra: Mapping[str, Any], where: str, error: type[ShardError] | type[ExportError]
) -> None:
    """`extra` may hold what JSON can hold, at most 16 levels deep."""
    level: list[Any] = [extra]
    for _ in range(_MAX_EXTRA_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                if not all(isinstance(key, str) for key in value):
                    raise error(f"{where}: extra: keys must be strings")
                below.extend(value.values())
            elif isinstance(value, list | tuple):
                below.extend(value)
            elif value is not None and not isinstance(value, str | int | float | bool):
                raise error(f"{where}: extra: {type(value).__name__} is not allowed")
        level = below
        if not level:
            return
    raise error(f"{where}: extra: nested more than {_MAX_EXTRA_DEPTH} levels deep")


def _check_zero(view: memoryview, begin: int, end: int, where: str) -> None:
    gap = np.frombuffer(view[begin:end], np.uint8)
    if gap.any():
        first = begin + int(np.flatnonzero(gap)[0])
        raise ShardError(f"{where}: byte {first}: expected zero padding, found {view[first]:#04x}")


def _describe(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)} at {spec.offset} ({spec.bytes} bytes)"
