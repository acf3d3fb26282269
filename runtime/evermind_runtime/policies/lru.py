"""Least recently used: the plainest policy. O(1), plus the pinned keys a search steps over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from .base import Evictable, ExpertKey


class LruPolicy:
    """Least recently used first, over all layers.

    A budget below one token's cycle gives it no hit at all: each expert is given up just
    before its layer comes round again.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """Nothing: only use counts."""

    def touched(self, key: ExpertKey) -> None:
        """Move `key` to the young end."""
        self._order[key] = None
        self._order.move_to_end(key)

    def removed(self, key: ExpertKey) -> None:
        """Forget `key`."""
        del self._order[key]

    def resync(self, resident: Collection[ExpertKey]) -> None:
        """What was not known is the youngest."""
        kept = [key for key in self._order if key in resident]
        self._order = OrderedDict.fromkeys([*kept, *resident])

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """The oldest evictable key."""
        return next((key for key in self._order if evictable(key)), None)
