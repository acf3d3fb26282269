"""A fixed set of experts, chosen from a routing profile, that is kept while there is room."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from .base import Evictable, ExpertKey, Policy


class PinnedPolicy:
    """Never gives up `pinned` as long as another policy, which rules the rest, has a victim.

    Nothing is read ahead: a pinned expert stays from its first use on.
    """

    def __init__(self, pinned: Iterable[ExpertKey], rest: Policy) -> None:
        """`pinned` hottest first."""
        self._rest = rest
        self._rank = {key: rank for rank, key in enumerate(pinned)}
        self._resident: set[ExpertKey] = set()

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """For the other policy."""
        self._rest.routed(layer, tokens)

    def touched(self, key: ExpertKey) -> None:
        """Keep `key`, or leave it to the other policy."""
        if key in self._rank:
            self._resident.add(key)
        else:
            self._rest.touched(key)

    def removed(self, key: ExpertKey) -> None:
        """Forget `key`."""
        if key in self._rank:
            self._resident.discard(key)
        else:
            self._rest.removed(key)

    def resync(self, resident: Collection[ExpertKey]) -> None:
        """To each its own."""
        self._resident = {key for key in resident if key in self._rank}
        self._rest.resync([key for key in resident if key not in self._rank])

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """The other policy's victim; if it has none, the coldest pinned key."""
        key = self._rest.victim(evictable)
        if key is None and self._resident:
            keys = sorted(self._resident, key=self._rank.__getitem__, reverse=True)
            key = next((key for key in keys if evictable(key)), None)
        return key
