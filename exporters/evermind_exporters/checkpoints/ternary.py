"""Ternary and power-of-three weights: quantisers, and the packed layouts that store them.

    base-3       5 trits a byte, lowest digit first: sum of (t_i + 1) 3^i; 1.6 bits a weight
    two-bit      4 trits a byte, lowest bits first: 00 = 0, 01 = +1, 11 = -1; 2 bits
    power-of-3   8 levels in 3 bytes, 3 bits each: 0, +1, -1, +3, -3, +9, -9 = codes 0 to 6

The last byte is filled up with zeros. Decoding is strict: a byte or code that stands for
nothing, and padding that is not zero, are refused. Source: specs/tilelli.md, sections 1 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import CheckpointError

FloatArray: TypeAlias = npt.NDArray[np.float32]
Trits: TypeAlias = npt.NDArray[np.int8]
Packed: TypeAlias = npt.NDArray[np.uint8]

BASE3_TRITS: Final = 5
TWO_BIT_TRITS: Final = 4
# Magnitudes and the inclusive thresholds on |W| / alpha from which on they are used.
_POWER3: Final = ((1, 0.5), (3, 2.0), (9, 6.0))
# By code; 7 stands for nothing.
_LEVELS: Final = np.array([0, 1, -1, 3, -3, 9, -9], dtype=np.int8)
_SMALLEST_ALPHA: Final = np.float32(1e-5)
_BASE3_WEIGHTS: Final = 3 ** np.arange(BASE3_TRITS)
_BASE3_LIMIT: Final = 3**BASE3_TRITS
# Two-bit code of the trits -1, 0, 1.
_TWO_BIT_CODES: Final = np.array([3, 0, 1], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Quantised:
    """`alpha * codes` is the weight used.

    `codes` int8 has the weight's shape: trits, or levels of power-of-three. `alpha` float32
    is (1,), or (rows,) with one for each index of the first axis.
    """

    codes: Trits
    alpha: FloatArray

    def values(self) -> FloatArray:
        """The weight used, float32."""
        shape = (-1,) + (1,) * (self.codes.ndim - 1)
        product: FloatArray = self.alpha.reshape(shape) * self.codes.astype(np.float32)
        return product


def absmean(weight: FloatArray, *, per_row: bool = False, where: str = "weight") -> FloatArray:
    """alpha = max(mean |W|, 1e-5), (1,) or (rows,) float32; the mean is summed in double.

    Raises `CheckpointError`, naming `where`, for a weight that is not finite.
    """
    rows = np.abs(weight).reshape(len(weight) if per_row else 1, -1)
    alpha = rows.mean(axis=1, dtype=np.float64).astype(np.float32)
    if not np.isfinite(alpha).all():
        raise CheckpointError(f"{where}: expected finite numbers, found infinities or NaN")
    floored: FloatArray = np.maximum(alpha, _SMALLEST_ALPHA)
    return floored


def ternarise(weight: FloatArray, *, per_row: bool = False, where: str = "weight") -> Quantised:
    """Trits round(W / alpha) limited to -1, 0, 1; halves go to the even neighbour.

    Raises `CheckpointError`, naming `where`, for a weight that is not finite.
    """
    alpha = absmean(weight, per_row=per_row, where=where)
    scaled = weight / alpha.reshape((-1,) + (1,) * (weight.ndim - 1))
    return Quantised(np.clip(np.rint(scaled), -1, 1).astype(np.int8), alpha)


def power_of_three(weight: FloatArray, *, per_row: bool = False) -> Quantised:
    """Levels 0, 1, 3, 9 with the weight's sign, by the thresholds 0.5, 2, 6 on |W| / alpha."""
    alpha = absmean(weight, per_row=per_row)
    scaled = np.abs(weight) / alpha.reshape((-1,) + (1,) * (weight.ndim - 1))
    levels = np.zeros(weight.shape, dtype=np.int8)
    for level, threshold in _POWER3:
        levels[scaled >= threshold] = level
    return Quantised(np.where(weight < 0, -levels, levels).astype(np.int8), alpha)


def recover(weight: FloatArray, where: str, *, per_row: bool = False) -> Quantised:
    """Trits and alpha of a weight that is `alpha * trits` already.

    Raises `CheckpointError` when a value is none of -alpha, 0 and alpha. The alpha of a row of
    zeros, which may be anything, is 1e-5.
    """
    rows = np.abs(weight).reshape(len(weight) if per_row else 1, -1)
    alpha = rows.max(axis=1)
    if not (np.isfinite(rows) & ((rows == 0) | (rows == alpha[:, None]))).all():
        raise CheckpointError(
            f"{where}: expected every value to be 0 or one magnitude with a sign, as in weights "
            "that were made ternary before",
            hint='For weights as they were trained, leave "weights" out of the configuration.',
        )
    alpha[alpha == 0] = _SMALLEST_ALPHA
    return Quantised(np.sign(weight).astype(np.int8), alpha)


def base3_bytes(count: int) -> int:
    """How many bytes `count` trits take."""
    return -(-count // BASE3_TRITS)


def two_bit_bytes(count: int) -> int:
    """How many bytes `count` trits take."""
    return -(-count // TWO_BIT_TRITS)


def power3_bytes(count: int) -> int:
    """How many bytes `count` levels take."""
    return -(-count // 8) * 3


def pack_base3(trits: Trits) -> Packed:
    """Trits of shape (…, n) to bytes (…, ceil(n / 5)): each row begins a byte of its own."""
    digits = _padded(trits, BASE3_TRITS) + 1
    packed: Packed = (digits @ _BASE3_WEIGHTS).astype(np.uint8)
    return packed


def unpack_base3(packed: npt.ArrayLike, count: int, where: str) -> Trits:
    """The first `count` trits of bytes (n,). Raises `CheckpointError` for bytes above 242."""
    data = _exactly(packed, base3_bytes(count), where)
    if (bad := data[data >= _BASE3_LIMIT]).size:
        raise CheckpointError(f"{where}: base-3 byte: expected at most 242, found {bad[0]}")
    digits = data[:, None] // _BASE3_WEIGHTS % 3
    return _without_padding(digits.astype(np.int8).ravel() - np.int8(1), count, where)


def pack_two_bit(trits: Trits) -> Packed:
    """Trits of shape (…, n) to bytes (…, ceil(n / 4)): each row begins a byte of its own."""
    codes = _TWO_BIT_CODES[_padded(trits, TWO_BIT_TRITS) + 1]
    shifted = codes << np.array([0, 2, 4, 6], dtype=np.uint8)
    packed: Packed = np.bitwise_or.reduce(shifted, axis=-1)
    return packed


def unpack_two_bit(packed: npt.ArrayLike, count: int, where: str) -> Trits:
    """The first `count` trits of bytes (n,). Raises `CheckpointError` for the code 10."""
    data = _exactly(packed, two_bit_bytes(count), where)
    codes = (data[:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8)) & 3
    if (codes == 2).any():
        raise CheckpointError(f"{where}: two-bit code: expected 00, 01 or 11, found 10")
    trits = np.array([0, 1, 0, -1], dtype=np.int8)[codes].ravel()
    return _without_padding(trits, count, where)


def pack_power3(levels: Trits) -> Packed:
    """Levels of shape (n,) to bytes (3 ceil(n / 8),)."""
    codes = np.searchsorted(_SORTED_LEVELS, _padded(levels, 8))
    bits = _CODE_OF_SORTED[codes].astype(np.uint32) << (3 * np.arange(8, dtype=np.uint32))
    words = np.bitwise_or.reduce(bits, axis=-1).astype("<u4")
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4)[:, :3]).ravel()


def unpack_power3(packed: npt.ArrayLike, count: int, where: str) -> Trits:
    """The first `count` levels of bytes (n,). Raises `CheckpointError` for the code 7."""
    data = _exactly(packed, power3_bytes(count), where).reshape(-1, 3).astype(np.uint32)
    words = data[:, 0] | data[:, 1] << 8 | data[:, 2] << 16
    codes = (words[:, None] >> (3 * np.arange(8, dtype=np.uint32))) & 7
    if (codes == 7).any():
        raise CheckpointError(f"{where}: power-of-three code: expected 0 to 6, found 7")
    return _without_padding(_LEVELS[codes].ravel(), count, where)


_CODE_OF_SORTED: Final = np.argsort(_LEVELS)
_SORTED_LEVELS: Final = _LEVELS[_CODE_OF_SORTED]


def _padded(codes: Trits, group: int) -> npt.NDArray[Any]:
    """Codes (…, n) in groups (…, ceil(n / group), group), filled up with zeros."""
    width = codes.shape[-1]
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, -width % group)]
    return np.pad(codes, pad).reshape(*codes.shape[:-1], -(-width // group), group)


def _exactly(packed: npt.ArrayLike, count: int, where: str) -> Packed:
    data: Packed = np.asarray(packed, dtype=np.uint8).reshape(-1)
    if data.size != count:
        raise CheckpointError(f"{where}: expected {count:,} packed bytes, found {data.size:,}")
    return data


def _without_padding(codes: Trits, count: int, where: str) -> Trits:
    if codes[count:].any():
        raise CheckpointError(f"{where}: expected zeros after the last of {count:,} values")
    return codes[:count]
