"""The table of slots: which expert lies where, what is pinned, what may go. No I/O.

Everything here is called under the pager's lock. A slot is always in one of four places:
free; *resident*, holding a verified expert; *loading*, pinned by the job that fills it; or
left over by a job that failed, until the last who waited for it lets go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .devices import Device, Slot
from .policies import Evictable, ExpertKey, Policy

_Job = TypeVar("_Job")


@dataclass(slots=True)
class SlotCounters:
    """Evictions so far, and the bytes of all slots."""

    evictions: int = 0
    resident_bytes: int = 0
    peak_resident_bytes: int = 0


class SlotTable(Generic[_Job]):
    """All slots of one pager; together they never exceed the budget.

    A bare `pins` is changed in the same line of bytecode as the list that remembers it, so
    that Ctrl-C cannot come between; `recover` puts the rest in order after it.
    """

    def __init__(
        self, device: Device, size: int, budget: int, experts: int, policy: Policy
    ) -> None:
        """Slots of `size` bytes, for a package of so many `experts`."""
        self.counters = SlotCounters()
        self.resident: dict[ExpertKey, Slot] = {}
        self.loading: dict[ExpertKey, _Job] = {}
        #: Slots that are pinned, by steps or by jobs.
        self.pinned = 0
        self._size = size
        #: How many there may be.
        self.most = min(budget // size, experts) if size else 0
        self._new_slot = device.slots(size, self.most)
        self._policy = policy
        #: Every slot there is, wherever it is.
        self.all: list[Slot] = []
        self._free: list[Slot] = []

    def pin(self, slots: Sequence[Slot], pinned: list[Slot]) -> None:
        """Pin each once more; `pinned` remembers."""
        for slot in slots:
            self.pinned += slot.pins == 0
            pinned += (slot,)
            slot.pins += 1

    def unpin(self, pinned: list[Slot]) -> bool:
        """Undo the pins that `pinned` remembers; whether that made room."""
        before = self.pinned
        while pinned:
            slot = pinned[-1]
            del pinned[-1]
            slot.pins -= 1
            if slot.pins <= 0:
                self._unpinned(slot)
        return self.pinned < before

    def fits(self, keys: Sequence[ExpertKey]) -> bool:
        """Whether `keys` fit beside all that is pinned."""
        if self.pinned + len(keys) <= self.most:
            return True
        new = 0
        for key in keys:
            slot = self.resident.get(key)
            new += slot.pins == 0 if slot is not None else key not in self.loading
        return self.pinned + new <= self.most

    def has_room(self) -> bool:
        """Whether one more slot can be pinned."""
        return self.pinned < self.most

    def evictable(self, key: ExpertKey) -> bool:
        """Whether nobody uses `key` now."""
        slot = self.resident.get(key)
        return slot is not None and slot.pins == 0

    def take(self, evictable: Evictable) -> Slot | None:
        """A free slot, a new one while the budget allows, or a victim's; `None` without one."""
        if self._free:
            return self._free.pop()
        if len(self.all) < self.most:
            slot = self._new_slot()
            self.all.append(slot)
            self._count()
            return slot
        key = self._policy.victim(evictable)
        if key is None:
            return None
        slot = self.resident.pop(key)
        slot.valid = False
        self._policy.removed(key)
        self.counters.evictions += 1
        return slot

    def begin(self, job: _Job, keys: Sequence[ExpertKey], slots: Sequence[Slot]) -> None:
        """`job` fills `slots`, which were taken, with `keys`."""
        for key, slot in zip(keys, slots, strict=True):
            self.pinned += slot.pins == 0
            self.loading[key] = job
            slot.pins += 1

    def end(
        self, job: _Job, keys: Sequence[ExpertKey], slots: Sequence[Slot], *, filled: bool
    ) -> None:
        """`job` is done with them. Does nothing the second time."""
        for key, slot in zip(keys, slots, strict=False):
            if self.loading.get(key) is not job:
                continue
            if filled:
                self._policy.touched(key)
                slot.valid = True
                self.resident[key] = slot
            del self.loading[key]
            slot.pins -= 1
            if slot.pins <= 0:
                self._unpinned(slot)

    def recover(self, jobs_slots: Callable[[_Job], Sequence[Slot]]) -> None:
        """Find again what was on its way between two places when an exception struck."""
        used = {id(slot) for slot in self.resident.values()}
        used |= {id(slot) for job in self.loading.values() for slot in jobs_slots(job)}
        self._free = [slot for slot in self.all if id(slot) not in used and not slot.pins]
        self.pinned = sum(slot.pins > 0 for slot in self.all)
        self._policy.resync(self.resident)

    def clear(self) -> None:
        """Forget every slot."""
        self.resident.clear()
        self._free.clear()
        self.all.clear()
        self._count()

    def _unpinned(self, slot: Slot) -> None:
        assert slot.pins == 0, "a slot was released twice"
        self.pinned -= 1
        if not slot.valid:
            self._free.append(slot)

    def _count(self) -> None:
        counters = self.counters
        counters.resident_bytes = len(self.all) * self._size
        counters.peak_resident_bytes = max(counters.peak_resident_bytes, counters.resident_bytes)
