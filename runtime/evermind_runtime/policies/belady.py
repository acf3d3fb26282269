"""Belady's policy: give up what is used furthest in the future, which only a replay knows.

The bound for every policy under the pager's rule that a step's experts stay while it runs:
exact when all experts have one size, a close guide otherwise. What was just read may be the
next victim, so an expert that will not pay its place passes through.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Collection, Sequence

from .base import Evictable, ExpertKey

_NEVER = 1 << 62


class BeladyPolicy:
    """Furthest next use first."""

    def __init__(self, uses: Sequence[Sequence[ExpertKey]]) -> None:
        """`uses`: for every step to come, its keys in the order they will be touched."""
        self._ends: list[int] = []
        self._future: defaultdict[ExpertKey, deque[int]] = defaultdict(deque)
        at = 0
        for keys in uses:
            for key in keys:
                self._future[key].append(at)
                at += 1
            self._ends.append(at)
        self._step = -1
        self._resident: set[ExpertKey] = set()
        self._heap: list[tuple[int, ExpertKey]] = []

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """The next step begins."""
        self._step += 1

    def touched(self, key: ExpertKey) -> None:
        """Its use in this step, if it has one, is over."""
        future = self._future[key]
        if future and future[0] < self._ends[self._step]:
            future.popleft()
        elif key in self._resident:
            return
        self._resident.add(key)
        heapq.heappush(self._heap, (-self._next_use(key), key))

    def removed(self, key: ExpertKey) -> None:
        """Forget that `key` is resident."""
        self._resident.discard(key)

    def resync(self, resident: Collection[ExpertKey]) -> None:
        """Build the heap anew."""
        self._resident = set(resident)
        self._heap = sorted((-self._next_use(key), key) for key in resident)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """The evictable key whose next use is the furthest."""
        passed: list[tuple[int, ExpertKey]] = []
        chosen: ExpertKey | None = None
        while self._heap and chosen is None:
            use, key = self._heap[0]
            if key in self._resident and -use == self._next_use(key) and evictable(key):
                chosen = key
            else:
                heapq.heappop(self._heap)
                if key in self._resident and -use == self._next_use(key):
                    passed.append((use, key))
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return chosen

    def _next_use(self, key: ExpertKey) -> int:
        future = self._future[key]
        return future[0] if future else _NEVER
