"""What the pager tells a policy, and the one question it asks.

A policy only orders keys: it never sees slots or pins and reads nothing. It is called under
the pager's lock, so it needs none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol, TypeAlias

ExpertKey: TypeAlias = tuple[int, int]
"""(layer, expert)"""

Evictable: TypeAlias = Callable[[ExpertKey], bool]
"""Whether a resident key may be given up now: the pager's pins."""


class Policy(Protocol):
    """Which expert to give up."""

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """A step of `layer` begins: its tokens, oldest first, use these experts.

        A decode step has one token. A prefill step has a chunk of them and then touches each
        expert among them once, in ascending order.
        """

    def touched(self, key: ExpertKey) -> None:
        """`key` is resident and was just used, or has just become resident."""

    def removed(self, key: ExpertKey) -> None:
        """`key` is no longer resident."""

    def resync(self, resident: Collection[ExpertKey]) -> None:
        """An exception, which may be Ctrl-C at any place, struck: these are what is resident."""

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """The next resident key to give up among those evictable; `None` if there is none."""
