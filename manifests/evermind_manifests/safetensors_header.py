"""Read the header of a safetensors file strictly: which tensor lies where.

The file is a u64 length n, n bytes of JSON `{name: {dtype, shape, data_offsets}}`, then
the data. Source: the safetensors format as its README describes it. As there, duplicate
names, holes and overlaps are refused, so that the file can be understood in one way only.
"""

from __future__ import annotations

import json
import struct
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from .dtypes import tensor_bytes
from .errors import IntegrityError, TruncatedError
from .manifest import Bytes, DType, Name, Shape
from .unique_keys import unique_keys

PREFIX_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 16 * 1024 * 1024

_DTYPES: Final[dict[str, DType]] = {
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    "F64": "f64",
    "I64": "i64",
    "I32": "i32",
    "U8": "u8",
    "BOOL": "bool",
}
#: How safetensors files name our dtypes.
SAFETENSORS_DTYPES: Final[dict[DType, str]] = {ours: theirs for theirs, ours in _DTYPES.items()}


# One byte each; packages have none of them, but checkpoints do. OCP 8-bit floating point, v1.0,
# and microscaling formats, v1.0.
_FOREIGN: Final = frozenset({"F8_E4M3", "F8_E8M0"})


class TensorRange(NamedTuple):
    """One tensor: `begin` and `end` count from the file's first byte.

    `foreign`: the file's name of a dtype that packages do not have; `dtype` is u8 then.
    """

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int
    foreign: str = ""


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Shape
    data_offsets: tuple[Bytes, Bytes]


# Before threads meet it: see shard.py.
_KNOWN = msgspec.json.Decoder(dict[Name, _Entry])


def header_bytes(prefix: bytes | memoryview, size: int, where: str) -> int:
    """How many bytes of a file of `size` bytes `read_header` needs, from its first 8.

    Raises `TruncatedError`, or `IntegrityError` for a header over 16 MiB.
    """
    if len(prefix) < PREFIX_BYTES or size < PREFIX_BYTES:
        raise TruncatedError(f"{where}: expected a safetensors file, found {size} bytes")
    (length,) = struct.unpack_from("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise IntegrityError(
            f"{where}: header: expected at most {MAX_HEADER_BYTES:,} bytes, found {length:,}"
        )
    if PREFIX_BYTES + length > size:
        raise TruncatedError(f"{where}: header: {length:,} bytes, the file has {size:,}")
    return PREFIX_BYTES + int(length)


def read_header(
    data: bytes | memoryview,
    where: str = "safetensors",
    *,
    size: int | None = None,
    foreign: bool = False,
) -> dict[str, TensorRange]:
    """The tensors of a safetensors file of `size` bytes (default: of `data`'s length).

    `data` holds at least the header. The tensors are in the order of the file and fill it
    without gaps. `foreign`: they may be 8-bit floats. Raises `IntegrityError` naming the tensor,
    or `TruncatedError`.
    """
    size = len(data) if size is None else size
    start = header_bytes(data, size, where)
    if len(data) < start:
        raise TruncatedError(f"{where}: header: expected {start} bytes, found {len(data)}")
    tensors = {
        name: _check_entry(name, entry, start, where, foreign)
        for name, entry in _parse(bytes(data[PREFIX_BYTES:start]), where).items()
    }
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].begin))
    position = start
    for name, tensor in ordered.items():
        if tensor.begin != position:
            raise IntegrityError(
                f"{where}: tensor {name!r}: expected to begin at {position}, found {tensor.begin}"
            )
        position = tensor.end
    if position != size:
        raise IntegrityError(f"{where}: the tensors end at {position}, the file at {size}")
    return ordered


def _parse(text: bytes, where: str) -> dict[str, _Entry]:
    if not text.startswith(b"{"):
        raise IntegrityError(f"{where}: header: expected a JSON object, found {text[:1]!r}")
    try:
        raw = json.loads(text, object_pairs_hook=unique_keys)
        metadata = raw.pop("__metadata__", {})
        msgspec.convert(metadata, dict[str, str])
        return msgspec.convert(raw, dict[Name, _Entry])
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: header: {error or type(error).__name__}") from error


def _check_entry(name: str, entry: _Entry, start: int, where: str, foreign: bool) -> TensorRange:
    strange = entry.dtype if foreign and entry.dtype in _FOREIGN else ""
    dtype = "u8" if strange else _DTYPES.get(entry.dtype)
    if dtype is None:
        raise IntegrityError(f"{where}: tensor {name!r}: unknown dtype {entry.dtype!r}")
    begin, end = entry.data_offsets
    needed = tensor_bytes(dtype, entry.shape)
    if end - begin != needed:
        raise IntegrityError(
            f"{where}: tensor {name!r}: {entry.dtype} {list(entry.shape)}: expected {needed} bytes,"
            f" found {end - begin}"
        )
    return TensorRange(dtype, entry.shape, start + begin, start + end, strange)
