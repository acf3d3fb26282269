"""The pager: experts in and out of memory under a hard byte budget.

`acquire` gives the slots of the experts a step needs, reading the missing ones; they stay
pinned until `release`. Nothing pinned is ever evicted, and the bytes of all slots together
never exceed the budget. One lock guards everything; requests from several threads take
turns, and one that finds all room pinned by others waits for their release.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from evermind_manifests.errors import ShardDigestError
from evermind_manifests.manifest import Kind, Shard
from evermind_manifests.package import Package, check_digest, shard_place
from evermind_manifests.shard import check_shard, read_header

from .budget import check_budget
from .devices import Device, Slot
from .policies import ExpertKey, Policy

Verify: TypeAlias = Literal["first", "always", "never"]


@dataclass(slots=True)
class PagerCounters:
    """What has happened so far. Bytes are as read from the store, times in seconds."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    resident_bytes: int = 0
    peak_resident_bytes: int = 0


class Pager:
    """Owns every slot of one package. Safe to use from several threads."""

    def __init__(
        self,
        package: Package,
        device: Device,
        budget: int,
        policy: Policy,
        *,
        verify: Verify = "first",
    ) -> None:
        """Nothing is read yet. Raises `BudgetError` if not even one step fits."""
        check_budget(budget, package.manifest)
        self.budget = budget
        self.counters = PagerCounters()
        #: Told of every routed step, as the policy is, while somebody records a trace.
        self.recorder: Callable[[int, Sequence[Sequence[int]]], None] | None = None
        self._package = package
        self._device = device
        self._verify = verify
        self._policy = policy
        self._kinds = {
            layer.layer: package.manifest.kinds[layer.kind] for layer in package.manifest.layers
        }
        self._resident: dict[ExpertKey, Slot] = {}
        self._free: dict[int, list[Slot]] = {}
        self._verified: set[ExpertKey] = set()
        self._pinned_bytes = 0
        self._released = threading.Condition()

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """A step of `layer` begins: for each token, oldest first, the experts it will acquire."""
        with self._released:
            self._policy.routed(layer, tokens)
            if self.recorder:
                self.recorder(layer, tokens)

    def acquire(self, layer: int, experts: Sequence[int]) -> list[Slot]:
        """The slots of these experts (all different) of one layer, pinned until `release`.

        Raises `ShardDigestError` if a shard is not what the manifest says, or whatever the
        store raises; nothing is pinned then.
        """
        keys = [(layer, expert) for expert in experts]
        with self._released:
            while not self._fits(keys):
                self._released.wait()
            slots: list[Slot] = []
            try:
                # Pin what is there first, so that reading the others cannot evict it.
                missing = []
                for key in keys:
                    if key in self._resident:
                        self._pin(self._resident[key])
                    else:
                        missing.append(key)
                for key in missing:
                    self._page_in(key)
                slots = [self._resident[key] for key in keys]
            except BaseException:
                self._unpin(self._resident[key] for key in keys if key in self._resident)
                raise
            for key in keys:
                self._policy.touched(key)
            self.counters.misses += len(missing)
            self.counters.hits += len(keys) - len(missing)
            return slots

    def release(self, slots: Iterable[Slot]) -> None:
        """Let go of slots that `acquire` gave."""
        with self._released:
            self._unpin(slots)

    def close(self) -> None:
        """Drop every slot."""
        with self._released:
            self._resident.clear()
            self._free.clear()
            self.counters.resident_bytes = 0

    def _pin(self, slot: Slot) -> None:
        if slot.pins == 0:
            self._pinned_bytes += slot.bytes
        slot.pins += 1

    def _unpin(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            slot.pins -= 1
            assert slot.pins >= 0, "a slot was released twice"
            if slot.pins == 0:
                self._pinned_bytes -= slot.bytes
        self._released.notify_all()

    def _fits(self, keys: Sequence[ExpertKey]) -> bool:
        """Whether `keys` fit beside what other requests have pinned."""
        needed = self._pinned_bytes
        for key in keys:
            slot = self._resident.get(key)
            if slot is None or slot.pins == 0:
                needed += self._kinds[key[0]].bytes
        return needed <= self.budget

    def _page_in(self, key: ExpertKey) -> None:
        """Read one expert into a slot and pin it."""
        kind = self._kinds[key[0]]
        slot = self._take_slot(kind)
        try:
            started = time.perf_counter()
            self._read(key, slot)
            self._device.upload(slot, kind)
            self.counters.read_seconds += time.perf_counter() - started
        except BaseException:
            self._free.setdefault(id(kind), []).append(slot)
            raise
        self._pin(slot)
        self._resident[key] = slot
        self._policy.touched(key)

    def _take_slot(self, kind: Kind) -> Slot:
        """A slot for `kind`: a free one, a new one while the budget allows, or a victim's."""
        while True:
            free = self._free.get(id(kind))
            if free:
                return free.pop()
            if self.counters.resident_bytes + kind.bytes <= self.budget:
                slot = self._device.new_slot(kind)
                self.counters.resident_bytes += kind.bytes
                self.counters.peak_resident_bytes = max(
                    self.counters.peak_resident_bytes, self.counters.resident_bytes
                )
                return slot
            self._evict(kind)

    def _evict(self, wanted: Kind) -> None:
        """Give up one expert; its slot is kept for the same kind, else its memory is freed."""
        for kind in self._kinds.values():
            if kind is not wanted and self._free.get(id(kind)):
                self._free[id(kind)].pop()
                self.counters.resident_bytes -= kind.bytes
                return
        key = self._policy.victim(lambda key: self._resident[key].pins == 0)
        assert key is not None, "the budget was checked to hold one step"
        slot = self._resident.pop(key)
        self._policy.removed(key)
        self.counters.evictions += 1
        kind = self._kinds[key[0]]
        if kind is wanted:
            self._free.setdefault(id(kind), []).append(slot)
        else:
            self.counters.resident_bytes -= kind.bytes

    def _read(self, key: ExpertKey, slot: Slot) -> None:
        shard = self._package.shard(*key)
        data = slot.buffer.data[: shard.bytes]
        self._read_bytes(shard, data)
        if self._verify == "never" or (self._verify == "first" and key in self._verified):
            return
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            # A transfer may have gone wrong; damage at rest comes back the same.
            self._read_bytes(shard, data)
        where, field = shard_place(shard), f"shard of layer {key[0]}, expert {key[1]}"
        location = self._package.location
        check_digest(data, shard.sha256, where, field, ShardDigestError, location)
        name, kind = self._package.kind_of(key[0])
        check_shard(read_header(data, shard.bytes, where), kind, shard, where, kind_name=name)
        self._verified.add(key)

    def _read_bytes(self, shard: Shard, data: memoryview) -> None:
        self._package.store.read_into(shard.file, shard.offset, data)
        self.counters.bytes_read += shard.bytes
