"""Choosing the next token, exactly as the peer does: specs/evermind-formats.md, section 8.4."""

from __future__ import annotations

import math

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
        scaled = logits.astype(np.float64)
        scaled /= self._temperature
        scaled -= scaled.max()
        weights = np.exp(scaled, out=scaled).astype(np.float32)
        # Sums and differences one by one, in order, as rounding decides on the boundary.
        left = np.empty(len(weights) + 1)
        left[1:] = weights
        left[0] = self._lcg.next() * np.add.accumulate(left[1:])[-1]
        below = np.subtract.accumulate(left, out=left)[1:] <= 0
        choice = int(below.argmax())
        return choice if below[choice] else len(weights) - 1


def greedy(logits: npt.NDArray[np.float32]) -> int:
    """The id of the largest logit, the lowest among equals.

    NaN never wins, but a NaN in position 0 makes the answer 0, as in the peer.
    """
    # Where there is a NaN, argmax finds the first.
    choice = int(logits.argmax())
    if not math.isnan(logits[choice]):
        return choice
    return 0 if choice == 0 else int(np.nanargmax(logits))
