"""Which expert to give up: eviction policies, apart from the pager that obeys them."""

from __future__ import annotations

from .base import Evictable, ExpertKey, Policy
from .decayed import DecayedPolicy
from .lfu import LfuPolicy
from .lru import LruPolicy
from .none import NoPolicy
from .pinned import PinnedPolicy

__all__ = [
    "DecayedPolicy",
    "Evictable",
    "ExpertKey",
    "LfuPolicy",
    "LruPolicy",
    "NoPolicy",
    "PinnedPolicy",
    "Policy",
]
