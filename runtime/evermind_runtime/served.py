"""What pooled steps chose, token by token, kept until it is counted: a token costs two copies."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

# Counting takes some 10 us a layer however many tokens there are.
_TOKENS = 128


class ServedTokens:
    """Room for the routes of some tokens. Safe to use from several threads."""

    def __init__(self, widths: Mapping[int, int]) -> None:
        """`widths` is how many experts a token has, by layer."""
        ends = np.cumsum(list(widths.values()), dtype=int).tolist()
        #: Where a layer's experts are in a row.
        self.spans = {
            layer: slice(end - width, end)
            for (layer, width), end in zip(widths.items(), ends, strict=True)
        }
        self.width = sum(widths.values())
        self._lock = threading.Lock()
        self._ids = np.empty((_TOKENS, self.width), dtype=np.int64)
        self._gates = np.empty((_TOKENS, self.width), dtype=np.float32)
        self._count = 0

    def add(self, ids: npt.NDArray[np.int64], gates: npt.NDArray[np.float32]) -> bool:
        """Keep one token's `ids` and `gates`, `(width,)`; whether there is room for another."""
        with self._lock:
            at = self._count
            self._ids[at], self._gates[at] = ids, gates
            self._count = at + 1
            return at + 1 < _TOKENS

    def take(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """What was kept, `(tokens, width)`, oldest first; nothing of it is kept any longer."""
        with self._lock:
            kept = self._ids[: self._count].copy(), self._gates[: self._count].copy()
            self._count = 0
            return kept
