"""What bends logits before a token is drawn, as transformers' logits processors do.

Each function is one processor of `transformers.generation.logits_process` for one row of
`(vocab,) float32` scores: the same operations in the same order in float32, so what they keep and
what they give is the same, but for softmax's last bit at the boundaries of `top_p` and `min_p`.
What is not kept becomes -inf. Their order is that of transformers' `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Warping:
    """Which tokens may be drawn. The defaults keep all: `top_k` 0, `top_p` 1, `min_p` 0."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is bent."""
        return self == Warping()

    def apply(self, logits: Scores, temperature: float) -> Scores:
        """The scores to draw from: `logits` over `temperature` > 0, -inf for what is left out."""
        scores = logits / np.float32(temperature)
        if self.top_k:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p < 1:
            scores = keep_top_p(scores, self.top_p)
        return keep_min_p(scores, self.min_p) if self.min_p else scores


def penalise(logits: Scores, seen: npt.NDArray[np.int64], penalty: float) -> Scores:
    """Divide the logits of the ids in `seen` by `penalty`, or multiply where they are negative."""
    scores = logits.copy()
    seen = seen[seen < len(scores)]
    found = scores[seen]
    scores[seen] = np.where(found < 0, found * np.float32(penalty), found / np.float32(penalty))
    return scores


def keep_top_k(scores: Scores, k: int) -> Scores:
    """The `k` largest, and all that equal the k-th."""
    if k >= len(scores):
        return scores
    least = np.partition(scores, -k)[-k]
    return _keep(scores, ~(scores < least))


def keep_top_p(scores: Scores, p: float) -> Scores:
    """The fewest of the largest whose probabilities reach `p`; at least one."""
    probabilities = _softmax(scores)
    bound = np.float32(1 - p)
    # What is so small that all of its like together stay below the bound need not be sorted.
    small = probabilities <= bound / len(scores)
    small[len(scores) - 1 - scores[::-1].argmax()] = False
    rest = np.flatnonzero(~small)
    rest = rest[np.argsort(scores[rest], kind="stable")]
    below = probabilities[small].sum(dtype=np.float64)
    reached = (np.cumsum(probabilities[rest], dtype=np.float64) + below).astype(np.float32)
    kept = ~small
    kept[rest[:-1]] = reached[:-1] > bound
    return _keep(scores, kept)


def keep_min_p(scores: Scores, p: float) -> Scores:
    """Those at least `p` times as probable as the most probable one."""
    probabilities = _softmax(scores)
    return _keep(scores, probabilities >= np.float32(p) * probabilities.max())


def _keep(scores: Scores, kept: npt.NDArray[np.bool_]) -> Scores:
    return np.where(kept, scores, np.float32(-np.inf))


def _softmax(scores: Scores) -> Scores:
    weights: Scores = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights
