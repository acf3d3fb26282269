"""FNV-1a, 32 bits: the checksum in an `.evermind` manifest (specs/evermind-formats.md, 12.1).

`h = 0x811C9DC5`, then for each byte `b`: `h = ((h xor b) * 0x01000193) mod 2^32`. A loop over
the bytes takes a second per 10 MB in Python. Here the loop is taken apart: `xor b` only adds
a number `d` to `h`, and `d` depends on the low byte of `h` alone. So the low bytes are found
first, bit by bit (a bit of the next state is a running xor once all lower bits are known),
and the rest is one polynomial in the prime, `h * p^n + sum d_i * p^(n-i)`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

OFFSET = 0x811C9DC5
PRIME = 0x01000193

_BLOCK = 1 << 15
_MASK = 0xFFFF_FFFF


def fnv1a(data: bytes | bytearray | memoryview, state: int = OFFSET) -> int:
    """The checksum of `data`, an unsigned 32-bit number; `state` continues an earlier one."""
    values = np.frombuffer(data, np.uint8)
    for begin in range(0, values.size, _BLOCK):
        state = _block(values[begin : begin + _BLOCK], state)
    return state


def _block(data: npt.NDArray[np.uint8], state: int) -> int:
    before = _low_bytes(data, state & 0xFF)
    difference = (before ^ data).astype(np.int32)
    difference -= before
    terms = difference.view(np.uint32) * _powers()[_BLOCK - data.size :]
    total = int(terms.sum(dtype=np.uint32))
    return (state * pow(PRIME, data.size, 1 << 32) + total) & _MASK


def _low_bytes(data: npt.NDArray[np.uint8], first: int) -> npt.NDArray[np.uint8]:
    """The low byte of the state before each byte of `data`, where it is `first` at the start."""
    low = np.zeros(data.size, np.uint8)
    for bit in range(8):
        mask = np.uint8(1 << bit)
        # What the product adds to this bit, beyond the bit itself: the prime is odd.
        mixed = (low ^ data) & (mask - np.uint8(1))
        mixed *= np.uint8(PRIME & 0xFF)
        mixed ^= data
        mixed &= mask
        low |= _xor_before(mixed, first >> bit & 1) << np.uint8(bit)
    return low


def _xor_before(flips: npt.NDArray[np.uint8], first: int) -> npt.NDArray[np.uint8]:
    """`first` xor all flips (nonzero: a flip) that stand before each place; values 0 and 1.

    64 places a word: within a word by doubling shifts, then over the words.
    """
    packed = np.packbits(flips, bitorder="little")
    words = np.zeros(-(-packed.size // 8), "<u8")
    words.view(np.uint8)[: packed.size] = packed
    running = words.copy()
    for shift in (1, 2, 4, 8, 16, 32):
        running ^= running << np.uint64(shift)
    parity = np.bitwise_xor.accumulate(running >> np.uint64(63))
    start = np.empty_like(parity)
    start[0] = first
    start[1:] = parity[:-1] ^ np.uint64(first)
    # All ones where the places before the word flipped; and from "up to" to "before".
    running ^= words ^ (np.uint64(0) - start)
    return np.unpackbits(running.view(np.uint8), count=flips.size, bitorder="little")


@cache
def _powers() -> npt.NDArray[np.uint32]:
    """`p^n … p^1` mod 2^32 for a whole block; its tail serves a shorter one."""
    powers = np.full(_BLOCK, PRIME, np.uint32)
    return np.multiply.accumulate(powers)[::-1].copy()
