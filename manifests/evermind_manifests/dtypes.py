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

from .errors import ContentError, ExportError, ShardError
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

#: The dtypes that `decode` turns into float32.
FLOATS: Final[frozenset[DType]] = frozenset({"f32", "f16", "bf16"})

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

# Values rounded at a time: what it takes in between stays in a core's cache.
_BLOCK: Final = 1 << 17

# Of float32: its exponent bits, 2^15, and the smallest normal half, 2^-14.
_F32_EXPONENT: Final = np.uint32(0x7F80_0000)
_LARGE: Final = np.uint32(142 << 23)
_LEAST_NORMAL: Final = np.uint32(113 << 23)
# 2^13 times as much; and -113 << 10 modulo 2^16, in bits that rounding leaves alone: of a half
# whose exponent is the least, the sum has the leading bit, and no other exponent counts so far.
_ROUNDER: Final = np.uint32((13 << 23) + 0x3C00)

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

    Raises `ContentError` when a finite value would become an infinity, `ExportError` when `array`
    is not float32, or for a dtype that does not hold floats of at most 32 bits.
    """
    if array.dtype != np.float32:
        raise ExportError(f"encode to {dtype}: expected a float32 array, found {array.dtype}")
    if dtype == "f32":
        return array
    if dtype not in ("f16", "bf16"):
        raise ExportError(f"float32 values cannot be stored as {dtype}")
    values = np.ascontiguousarray(array).reshape(-1)
    stored = np.empty(values.size, dtype=STORAGE[dtype])
    rounded = stored.view(np.uint16)
    nonfinite = 0
    scratch = _Scratch(min(values.size, _BLOCK))
    for begin in range(0, values.size, _BLOCK):
        block = values[begin : begin + _BLOCK]
        out = rounded[begin : begin + _BLOCK]
        if dtype == "f16" and rounding == "nearest" and scratch.round_f16(block, out):
            continue
        out[...] = _to_f16(block, rounding) if dtype == "f16" else _to_bf16(block, rounding)
        nonfinite += count_nonfinite(out, dtype)
    if nonfinite:
        _refuse_overflow(values, stored, dtype)
    return stored.reshape(array.shape)


def count_nonfinite(buffer: Stored, dtype: DType) -> int:
    """How many stored values are infinite or NaN; 0 for dtypes that hold no floats."""
    if dtype not in _EXPONENT:
        return 0
    pattern, mask = _EXPONENT[dtype]
    bits = np.frombuffer(buffer, pattern)
    return int(np.count_nonzero((bits & mask) == mask))


class _Scratch:
    """What rounding a block of at most `size` values to half precision writes in between."""

    def __init__(self, size: int) -> None:
        self._exponent = np.empty(size, np.uint32)
        self._sum = np.empty(size, np.uint32)
        self._magnitude = np.empty(size, np.float32)
        # An array: numpy compares with a number one by one.
        self._least = np.full(size, _LEAST_NORMAL)

    def round_f16(self, block: npt.NDArray[np.float32], out: npt.NDArray[np.uint16]) -> bool:
        """What `astype` gives, in half its time; False, and nothing, for magnitudes from 2^15 on.

        numpy rounds value by value, this in passes. A power of two, 2^13 times a value's own,
        is added to its magnitude: the sum has just the ten bits that stay, rounded to even, lowest
        in its mantissa. Where the half is subnormal it is 1/2, for the bits that it has.
        """
        bits = block.view(np.uint32)
        exponent, total = self._exponent[: block.size], self._sum[: block.size]
        magnitude = self._magnitude[: block.size]
        np.bitwise_and(bits, _F32_EXPONENT, out=exponent)
        if exponent.max() >= _LARGE:
            return False  # infinities and NaN too
        np.maximum(exponent, self._least[: block.size], out=exponent)
        np.add(exponent, _ROUNDER, out=total)
        np.abs(block, out=magnitude)
        sums = total.view(np.float32)
        sums += magnitude
        exponent >>= np.uint32(13)
        total += exponent
        np.right_shift(bits, np.uint32(16), out=exponent)
        exponent &= np.uint32(0x8000)
        total |= exponent
        out[...] = total  # the low 16 bits
        return True


def _to_f16(array: npt.NDArray[np.float32], rounding: Rounding) -> npt.NDArray[np.uint16]:
    bits = _astype_f16(array)
    if rounding == "nearest":
        return bits
    magnitude = np.abs(array)
    nearest = np.abs(bits.view(np.float16).astype(np.float32))
    rounded_up = (nearest > magnitude) & (magnitude < 65536)
    bits = bits - rounded_up.astype(np.uint16)
    # The peer drops a NaN's payload and keeps its sign.
    sign = (array.view(np.uint32) >> np.uint32(16)).astype(np.uint16) & np.uint16(0x8000)
    return np.where(np.isnan(array), sign | np.uint16(0x7E00), bits).astype(np.uint16)


def _astype_f16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float16).view(np.uint16)


def _to_bf16(array: npt.NDArray[np.float32], rounding: Rounding) -> npt.NDArray[np.uint16]:
    bits = array.view(np.uint32)
    if rounding == "nearest":
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    else:
        rounded = bits >> np.uint32(16)
    nan = np.isnan(array)
    if nan.any():
        # Rounding may carry a NaN into an infinity or cut its payload to zero: set the quiet bit.
        rounded = np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return rounded.astype(np.uint16)


def _refuse_overflow(
    array: npt.NDArray[np.float32], stored: npt.NDArray[Any], dtype: DType
) -> None:
    """Raise if a finite value became infinite; infinities and NaN may stay what they are."""
    pattern, mask = _EXPONENT[dtype]
    overflowed = np.isfinite(array) & ((stored.view(pattern) & mask) == mask)
    count = int(np.count_nonzero(overflowed))
    if count:
        largest = float(np.max(np.abs(array[overflowed])))
        raise ContentError(
            f"{count} of {array.size} finite values do not fit {dtype}; the largest magnitude is"
            f" {largest:g}",
            hint="Store weights with --dtype bf16 or --dtype f32.",
        )
