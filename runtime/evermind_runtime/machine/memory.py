"""How much memory this process may still take, and what limits it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..memory import memory_limits


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """Bytes, and what limits them."""

    bytes: int
    by: str


def available_memory() -> AvailableMemory | None:
    """The least of what the machine, the control groups and RLIMIT_AS leave.

    `None` where nothing is known.
    """
    limits = memory_limits() or _whole_machine()
    limits += _address_space()
    found = [AvailableMemory(size, name) for name, size in limits]
    return min(found, key=lambda one: one.bytes, default=None)


def _whole_machine() -> list[tuple[str, int]]:
    with contextlib.suppress(ValueError, OSError):
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return [("the machine's whole memory", size)]
    return []


def _address_space() -> list[tuple[str, int]]:
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return []
    if limit == resource.RLIM_INFINITY:
        return []
    return [("RLIMIT_AS", max(0, limit - pages * resource.getpagesize()))]
