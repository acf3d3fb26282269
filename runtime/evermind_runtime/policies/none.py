"""No eviction: for a budget that holds every expert, where ordering them would only cost time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .base import Evictable, ExpertKey


class NoPolicy:
    """Keeps everything; has no victim to name."""

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """Nothing to learn."""

    def touched(self, key: ExpertKey) -> None:
        """Nothing to order."""

    def removed(self, key: ExpertKey) -> None:
        """Never called: nothing is evicted."""

    def resync(self, resident: Collection[ExpertKey]) -> None:
        """Nothing to mend."""

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """None."""
        return None
