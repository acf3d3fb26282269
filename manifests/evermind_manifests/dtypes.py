"""Storage dtypes of tensors: sizes, and conversion between them and float32.

Half precision is rounded to nearest-even by default. `truncate` rounds toward zero and
gives the peer's bits (specs/evermind-formats.md, section 3). bfloat16 has no numpy dtype:
it is held as its 16-bit pattern.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import ExportError, ShardError
from .manifest import DType

Rounding: TypeAlias = Literal["nearest", "truncate"]

ITEMSIZE: Final[dict[DType, int]] = {
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "f64": 8,
    "i64": 8,
    "i32": 4,
    "u8": 1,
    "bool": 1,
}

Stored: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[Any]

# What an array of each dtype looks like in memory and, being little-endian, on disk.
STORAGE: Final[dict[DType, np.dtype[Any]]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f64": np.dtype("<f8"),
    "i64": np.dtype("<i8"),
    "i32": np.dtype("<i4"),
    "u8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

# The exponent bits: all ones means an infinity or a NaN.
_EXPONENT: Final[dict[str, tuple[str, int]]] = {
    "f16": ("<u2", 0x7C00),
    "bf16": ("<u2", 0x7F80),
    "f32": ("<u4", 0x7F80_0000),
    "f64": ("<u8", 0x7FF0_0000_0000_0000),
}


def tensor_bytes(dtype: DType, shape: tuple[int, ...]) -> int:
    """The exact length in bytes of a tensor; never overflows."""
    return ITEMSIZE[dtype] * math.prod(shape)


def decode(buffer: Stored, dtype: DType, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Stored bytes as an array of `shape`: float32 for f16, bf16 and f32, else the dtype itself.

    Where no conversion is needed the result is a view of `buffer`. Raises `ShardError` when
    the buffer's length is not that of the tensor.
    """
    raw = np.frombuffer(buffer, np.uint8)
    expected = tensor_bytes(dtype, shape)
    if raw.size != expected:
        raise ShardError(
            f"{dtype} tensor {list(shape)}: expected {expected:,} bytes, found {raw.size:,}"
        )
    stored = raw.view(STORAGE[dtype]).reshape(shape)
    if dtype == "bf16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "f16":
        return stored.astype(np.float32)
    return stored


def encode(
    array: npt.NDArray[np.float32], dtype: DType, rounding: Rounding = "nearest"
) -> npt.NDArray[Any]:
    """float32 values in their storage dtype: np.float16, np.uint16 (bf16 pattern) or np.float32.

    Raises `ExportError` when a finite value would become an infinity, when `array` is not
    float32, or for a dtype that does not hold floats of at most 32 bits.
    """
    if array.dtype != np.float32:
        raise ExportError(f"encode to {dtype}: expected a float32 array, found {array.dtype}")
    if dtype == "f32":
        return array
    if dtype == "f16":
        stored: npt.NDArray[Any] = _to_f16(array, rounding).view(np.float16)
    elif dtype == "bf16":
        stored = _to_bf16(array, rounding)
    else:
        raise ExportError(f"float32 values cannot be stored as {dtype}")
    _refuse_overflow(array, stored, dtype)
    return stored


def count_nonfinite(buffer: Stored, dtype: DType) -> int:
    """How many stored values are infinite or NaN; 0 for dtypes that hold no floats."""
    if dtype not in _EXPONENT:
        return 0
    pattern, mask = _EXPONENT[dtype]
    bits = np.frombuffer(buffer, pattern)
    return int(np.count_nonzero((bits & mask) == mask))


def _to_f16(array: npt.NDArray[np.float32], rounding: Rounding) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore", invalid="ignore"):
        half = array.astype(np.float16)
    bits = half.view(np.uint16)
    if rounding == "nearest":
        return bits
    magnitude = np.abs(array)
    rounded_up = (np.abs(half.astype(np.float32)) > magnitude) & (magnitude < 65536)
    bits = bits - rounded_up.astype(np.uint16)
    # The peer drops a NaN's payload and keeps its sign.
    sign = (array.view(np.uint32) >> np.uint32(16)).astype(np.uint16) & np.uint16(0x8000)
    return np.where(np.isnan(array), sign | np.uint16(0x7E00), bits).astype(np.uint16)


def _to_bf16(array: npt.NDArray[np.float32], rounding: Rounding) -> npt.NDArray[np.uint16]:
    bits = array.view(np.uint32)
    if rounding == "nearest":
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    else:
        rounded = bits >> np.uint32(16)
    # Rounding may carry a NaN into an infinity or cut its payload to zero: set the quiet bit.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(array), quiet, rounded).astype(np.uint16)


def _refuse_overflow(
    array: npt.NDArray[np.float32], stored: npt.NDArray[Any], dtype: DType
) -> None:
    if count_nonfinite(np.ascontiguousarray(stored), dtype) == 0:
        return
    pattern, mask = _EXPONENT[dtype]
    overflowed = np.isfinite(array) & ((stored.view(pattern) & mask) == mask)
    count = int(np.count_nonzero(overflowed))
    if count:
        largest = float(np.max(np.abs(array[overflowed])))
        raise ExportError(
            f"{count} of {array.size} finite values do not fit {dtype}; the largest magnitude is"
            f" {largest:g}",
            hint="Export with --dtype bf16 or --dtype f32.",
        )
