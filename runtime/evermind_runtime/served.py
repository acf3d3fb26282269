"""What pooled steps chose, token by token, kept until it is counted: a token costs two copies."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

# Counting takes some 50 us a layer however many tokens there are.
_BYTES = 64 * 1024
_LEAST_TOKENS = 32

#: Expert ids and their gates, `(tokens, width)`, oldest token first.
Served: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


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
        #: How many tokens there is room for.
        self.most = max(_LEAST_TOKENS, _BYTES // max(1, self.width * 12))
        self._lock = threading.Lock()
        self._ids = np.empty((self.most, self.width), dtype=np.int64)
        self._gates = np.empty((self.most, self.width), dtype=np.float32)
        self._count = 0

    def add(
        self, ids: npt.NDArray[np.int64], gates: npt.NDArray[np.float32], *, keep: bool
    ) -> Served | None:
        """Keep one token's `ids` and `gates`, `(width,)`.

        All that was kept, and nothing of it is any longer, once there is no room for another
        or if this is not to be kept; else `None`.
        """
        with self._lock:
            # Full already only where Ctrl-C came before what was kept could be handed out.
            at = self._count % self.most
            self._ids[at] = ids
            self._gates[at] = gates
            self._count = at + 1
            return None if keep and at + 1 < self.most else self._take()

    def take(self) -> Served:
        """What was kept; nothing of it is any longer."""
        with self._lock:
            return self._take()

    def _take(self) -> Served:
        kept = self._ids[: self._count].copy(), self._gates[: self._count].copy()
        self._count = 0
        return kept
