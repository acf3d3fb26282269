"""The default: give up the expert least likely to be used when its layer next runs.

An expert is as likely to be used again as its *decayed count* is high: every token its layer
routed to it counts one, and half as much for every 12 later tokens of that layer. Two things
that routers do are added, both measured on recorded traces (docs/paging.md):

- what a layer's latest token used is used again far more often than its count says: times 4;
- layers run in turn, so of two equally likely experts the one whose layer runs later can wait:
  times 1 for the next layer to run, falling to a half for the one that has just run.

All layers compete for one budget. A layer whose routing is concentrated keeps few experts, a
layer whose routing is spread keeps many, and a budget below one token's cycle still keeps the
best. Expert sizes do not enter: a read saved is worth the bytes it occupies.

A prompt's chunk counts by its last 24 tokens only, so that prefill neither washes out what
other sequences are decoding nor favours what the prompt began with. While the chunk is run,
expert by expert, those still to come are kept: giving one up would cost a read for certain.

Counts are kept as logarithms on a scale that grows with the layer's tokens, where they change
only when their expert is used and then only rise. A heap per layer may therefore hold old
values and be corrected when asked: O(1) per use beside O(log n) amortised, and a victim costs
one look at each layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from math import inf, log2

from .base import Evictable, ExpertKey

HALF_LIFE = 12  # tokens; 8 to 24 differ by less than 0.02 in hit rate on every trace
_JUST_USED = 2.0  # bits: times 4
_LOOKAHEAD = 1.0  # bits over one cycle of layers
# Older tokens of a chunk would count less than a quarter.
_CHUNK_TOKENS = 2 * HALF_LIFE


class DecayedPolicy:
    """Least decayed count first, over all layers."""

    def __init__(self, layers: Sequence[int]) -> None:
        """`layers` in the order they run."""
        self._layers = [_LayerHeat(layer) for layer in layers]
        self._position = {layer: at for at, layer in enumerate(layers)}
        self._turn = self._layers

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """Count the tokens; `layer` is now the last to run again."""
        at = self._position[layer]
        self._turn[-1].stop()
        self._layers[at].run(tokens)
        self._turn = self._layers[at + 1 :] + self._layers[: at + 1]

    def touched(self, key: ExpertKey) -> None:
        """Keep `key` among the resident."""
        self._layers[self._position[key[0]]].touched(key[1])

    def removed(self, key: ExpertKey) -> None:
        """`key` keeps its count, should it come back."""
        self._layers[self._position[key[0]]].removed(key[1])

    def resync(self, resident: Collection[ExpertKey]) -> None:
        """Build every layer's heap anew; counts are kept."""
        for layer in self._layers:
            layer.resync(expert for at, expert in resident if at == layer.layer)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """The evictable key least likely to be used soon."""
        passed: list[ExpertKey] = []
        try:
            key = self._coldest()
            while key is not None and not evictable(key):
                passed.append(key)
                self._layers[self._position[key[0]]].pass_over(key[1])
                key = self._coldest()
        finally:
            for layer, expert in passed:
                self._layers[self._position[layer]].take_back(expert)
        return key or self._needed(evictable)

    def _coldest(self) -> ExpertKey | None:
        step = _LOOKAHEAD / len(self._layers)
        least, chosen, handicap = inf, None, 0.0
        for layer in self._turn:
            value = (layer.cached or layer.coldest())[0] - handicap
            if value < least:
                least, chosen = value, layer
            handicap += step
        return (chosen.layer, chosen.coldest()[1]) if chosen else None

    def _needed(self, evictable: Evictable) -> ExpertKey | None:
        """When all else is pinned: what a running step has used, or has yet to come to."""
        keys = ((layer.layer, expert) for layer in self._layers for expert in layer.needed())
        return next((key for key in keys if evictable(key)), None)


class _LayerHeat:
    """One layer's decayed counts, and its resident experts from cold to hot.

    A resident expert is in exactly one place: `_awaited` by the running chunk, `_latest` (the
    latest token used it), `_passed` over by the running search, or else in `_heap`. The heap
    may also hold experts that have left it, at most one entry each (`_queued`).
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        #: What `coldest` found, while nothing has changed.
        self.cached: tuple[float, int] | None = None
        self._now = 0.0  # half-lives since the start
        self._heat: dict[int, float] = {}  # log2 of the count, as if counted at time 0
        self._resident: set[int] = set()
        self._running = False
        self._latest: frozenset[int] = frozenset()
        self._awaited: set[int] = set()
        self._passed: set[int] = set()
        self._heap: list[tuple[float, int]] = []
        self._queued: set[int] = set()

    def run(self, tokens: Sequence[Sequence[int]]) -> None:
        """A step begins: count these tokens' experts, oldest token first."""
        heat, now = self._heat, self._now
        for experts in tokens[-_CHUNK_TOKENS:]:
            now += 1 / HALF_LIFE
            for expert in experts:
                heat[expert] = now + log2(1.0 + 2.0 ** (heat.get(expert, -inf) - now))
        left = self._latest | self._awaited
        self._now = now
        self._running = True
        self._latest = frozenset(tokens[-1])
        self._awaited = {e for row in tokens for e in row} if len(tokens) > 1 else set()
        for expert in left:
            self._queue(expert)
        self.cached = None

    def stop(self) -> None:
        """Another layer's step begins."""
        self._running = False
        self.cached = None

    def touched(self, expert: int) -> None:
        """`expert` is resident, and no longer awaited."""
        self._resident.add(expert)
        self._awaited.discard(expert)
        if expert not in self._latest:
            self._queue(expert)
        self.cached = None

    def removed(self, expert: int) -> None:
        """`expert` is no longer resident."""
        self._resident.discard(expert)
        self.cached = None

    def resync(self, resident: Iterable[int]) -> None:
        """These are resident, and no search is under way."""
        self._resident = set(resident)
        self._passed = set()
        self._heap, self._queued = [], set()
        for expert in self._resident:
            self._queue(expert)
        self.cached = None

    def coldest(self) -> tuple[float, int]:
        """log2 of the lowest decayed count and its expert, needed ones apart; else `inf`."""
        if self.cached is None:
            self.cached = self._coldest_queued()
            if not self._running:
                self.cached = min(self.cached, self._coldest_latest())
        return self.cached

    def needed(self) -> list[int]:
        """What `coldest` leaves out while a step runs: first what it may be done with."""
        latest = self._latest - self._awaited if self._running else frozenset()
        return [
            *(latest & self._resident),
            *sorted(self._awaited & self._resident, key=lambda e: self._heat.get(e, -inf)),
        ]

    def pass_over(self, expert: int) -> None:
        """Leave `expert` out of `coldest` until it is taken back."""
        self._passed.add(expert)
        self.cached = None

    def take_back(self, expert: int) -> None:
        """Undo `pass_over`."""
        self._passed.discard(expert)
        self._queue(expert)
        self.cached = None

    def _in_heap(self, expert: int) -> bool:
        return (
            expert in self._resident
            and expert not in self._latest
            and expert not in self._awaited
            and expert not in self._passed
        )

    def _queue(self, expert: int) -> None:
        if expert not in self._queued and self._in_heap(expert):
            self._queued.add(expert)
            heapq.heappush(self._heap, (self._heat.get(expert, -inf), expert))

    def _coldest_queued(self) -> tuple[float, int]:
        heap, heats = self._heap, self._heat
        while heap:
            value, expert = heap[0]
            if not self._in_heap(expert):
                heapq.heappop(heap)
                self._queued.discard(expert)
                continue
            heat = heats.get(expert, -inf)
            if heat == value:
                return heat - self._now, expert
            heapq.heapreplace(heap, (heat, expert))
        return inf, -1

    def _coldest_latest(self) -> tuple[float, int]:
        least = inf, -1
        for expert in self._latest:
            if expert in self._resident:
                found = self._heat[expert] - self._now + _JUST_USED, expert
                if found < least and expert not in self._awaited and expert not in self._passed:
                    least = found
        return least
