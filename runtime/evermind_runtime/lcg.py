"""The peer's random numbers: a 32-bit LCG and Box-Muller draws.

Source: specs/evermind-formats.md, section 2. Used by the sampler and by the models'
initial weights, which must come out byte-identical.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_A = 1664525
_C = 1013904223
_BLOCK = 1 << 20


def to_uint32(seed: float) -> int:
    """ECMAScript ToUint32: drop the fraction toward zero, wrap modulo 2^32; NaN and inf give 0."""
    if isinstance(seed, float) and not math.isfinite(seed):
        return 0
    return int(seed) % 2**32


class Lcg:
    """One stream of the generator; `state` is the last value, never emitted before it moved."""

    def __init__(self, seed: float) -> None:
        self.state = to_uint32(seed) or 1

    def next(self) -> float:
        """The next uniform double in [0, 1)."""
        self.state = (_A * self.state + _C) % 2**32
        return self.state / 4294967296.0

    def uniforms(self, n: int) -> npt.NDArray[np.float64]:
        """The next `n` uniforms as `(n,) float64`; the same numbers as `n` calls of `next`."""
        # state_i = a^i * s + c * (a^0 + ... + a^(i-1)), all modulo 2^32.
        powers = np.full(n, _A, dtype=np.uint32)
        np.multiply.accumulate(powers, out=powers)
        shifted = np.ones(n, dtype=np.uint32)
        shifted[1:] = powers[:-1]
        offsets = np.add.accumulate(shifted, dtype=np.uint32) * np.uint32(_C)
        states = powers * np.uint32(self.state) + offsets
        if n:
            self.state = int(states[-1])
        return states.astype(np.float64) / 4294967296.0

    def gaussian(self, n: int, std: float) -> npt.NDArray[np.float32]:
        """`n` draws of N(0, std) as `(n,) float32`: two uniforms each, cosine branch only."""
        out = np.empty(n, dtype=np.float32)
        for start in range(0, n, _BLOCK):
            count = min(_BLOCK, n - start)
            pairs = self.uniforms(2 * count).reshape(count, 2)
            radius = std * np.sqrt(-2.0 * np.log(np.maximum(pairs[:, 0], 1e-12)))
            out[start : start + count] = radius * np.cos((2.0 * np.pi) * pairs[:, 1])
        return out
