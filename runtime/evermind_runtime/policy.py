"""Which expert to give up: eviction policies, apart from the pager that obeys them.

A policy only orders keys; it never sees bytes, slots or pins. Every call is O(1), except
that a victim search steps over the few experts that are pinned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeAlias

ExpertKey: TypeAlias = tuple[int, int]
"""(layer, expert)"""


class Policy(Protocol):
    """What the pager tells a policy, and the one question it asks."""

    def touched(self, key: ExpertKey) -> None:
        """`key` is resident and was just used, or has just become resident."""

    def removed(self, key: ExpertKey) -> None:
        """`key` is no longer resident."""

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The next key to give up among those that are evictable; `None` if there is none."""


class LruPolicy:
    """Least recently used first, over all layers."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def touched(self, key: ExpertKey) -> None:
        """Move `key` to the young end."""
        self._order[key] = None
        self._order.move_to_end(key)

    def removed(self, key: ExpertKey) -> None:
        """Forget `key`."""
        del self._order[key]

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The oldest evictable key."""
        return next((key for key in self._order if evictable(key)), None)
