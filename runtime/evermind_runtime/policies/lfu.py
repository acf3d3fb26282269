"""Least frequently used, ever: for comparison in replays. O(log n) amortised."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Sequence

from .base import Evictable, ExpertKey


class LfuPolicy:
    """Fewest uses since the start first, over all layers."""

    def __init__(self) -> None:
        self._uses: Counter[ExpertKey] = Counter()
        self._resident: set[ExpertKey] = set()
        # Counts only rise, so an old entry is a lower bound, corrected when it comes up.
        self._heap: list[tuple[int, ExpertKey]] = []
        self._queued: set[ExpertKey] = set()

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """Count every token's experts."""
        self._uses.update((layer, expert) for experts in tokens for expert in experts)

    def touched(self, key: ExpertKey) -> None:
        """Keep `key` among the resident."""
        self._resident.add(key)
        if key not in self._queued:
            self._queued.add(key)
            heapq.heappush(self._heap, (self._uses[key], key))

    def removed(self, key: ExpertKey) -> None:
        """`key` keeps its count, should it come back."""
        self._resident.discard(key)

    def resync(self, resident: Collection[ExpertKey]) -> None:
        """Build the heap anew."""
        self._resident, self._queued = set(resident), set(resident)
        self._heap = sorted((self._uses[key], key) for key in resident)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """The evictable key with the fewest uses."""
        heap = self._heap
        passed: list[tuple[int, ExpertKey]] = []
        chosen: ExpertKey | None = None
        while heap and chosen is None:
            uses, key = heap[0]
            if key not in self._resident:
                heapq.heappop(heap)
                self._queued.discard(key)
            elif uses != self._uses[key]:
                heapq.heapreplace(heap, (self._uses[key], key))
            elif evictable(key):
                chosen = key
            else:
                passed.append(heapq.heappop(heap))
        for entry in passed:
            heapq.heappush(heap, entry)
        return chosen
