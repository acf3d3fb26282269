"""What a model has done so far, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the model was loaded. Bytes are exact, times in seconds.

    A hit is an expert a step needed and found resident, a miss one that had to be read.
    `read_seconds` adds up what reads took, of which several may run at once; `wait_seconds` is
    what steps waited for the experts they missed. `prefetches` experts were read on a guess,
    of which `prefetches_used` were needed; `prefetch_wasted_bytes` were read for the others.
    `io` is how experts are read, "direct" or "buffered", and `io_note` why not directly.
    `threads` compute; a process's first package sets up as many for all.
    `resident_expert_bytes` counts whole slots, in the dtype the experts are held in.
    """

    tokens: int
    expert_hits: int
    expert_misses: int
    evictions: int
    bytes_read: int
    read_seconds: float
    wait_seconds: float
    prefetches: int
    prefetches_used: int
    prefetch_wasted_bytes: int
    io: str
    io_note: str
    resident_expert_bytes: int
    peak_resident_expert_bytes: int
    budget_bytes: int
    threads: int

    @property
    def hit_rate(self) -> float:
        """Hits over all needs; 0 before the first."""
        needs = self.expert_hits + self.expert_misses
        return self.expert_hits / needs if needs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and the hit rate, ready for JSON."""
        return asdict(self) | {"hit_rate": self.hit_rate}
