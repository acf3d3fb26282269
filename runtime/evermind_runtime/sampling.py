"""Choosing the next token, exactly as the peer does: specs/evermind-formats.md, section 8.4."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .lcg import Lcg

DEFAULT_SEED = 1


class Sampler:
    """Greedy (`temperature` 0) or temperature sampling with the peer's generator.

    One uniform is drawn per sampled token; a seed of 0 is the same stream as 1.
    """

    def __init__(self, temperature: float = 0.0, seed: int | None = None) -> None:
        self._temperature = temperature
        self._lcg = Lcg(DEFAULT_SEED if seed is None else seed)

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token id for `logits` `(vocab,) float32`."""
        if self._temperature <= 0:
            return greedy(logits)
        scaled = logits.astype(np.float64) / self._temperature
        weights = np.exp(scaled - scaled.max()).astype(np.float32).astype(np.float64)
        # Sums and differences one by one, in order, as rounding decides on the boundary.
        total = np.add.accumulate(weights)[-1]
        left = np.subtract.accumulate(np.concatenate(([self._lcg.next() * total], weights)))[1:]
        below = left <= 0
        return int(np.argmax(below)) if below.any() else len(logits) - 1


def greedy(logits: npt.NDArray[np.float32]) -> int:
    """The id of the largest logit, the lowest among equals.

    NaN never wins, but a NaN in position 0 makes the answer 0, as in the peer.
    """
    if np.isnan(logits[0]):
        return 0
    return int(np.nanargmax(logits))
