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
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from evermind_manifests.errors import GraphError, ShardDigestError
from evermind_manifests.manifest import Shard
from evermind_manifests.package import Package, check_digest, shard_place
from evermind_manifests.shard import check_shard, read_header

from .budget import check_budget
from .devices import Device, Slot
from .layers import slot_bytes
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


@dataclass(slots=True)
class ExpertPages:
    """What has happened to one expert so far."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0


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
        #: The same by expert, for those that were ever needed.
        self.pages: defaultdict[ExpertKey, ExpertPages] = defaultdict(ExpertPages)
        #: Told of every routed step, as the policy is, while somebody records a trace.
        self.recorder: Callable[[int, Sequence[Sequence[int]]], None] | None = None
        self._package = package
        self._device = device
        self._verify = verify
        self._policy = policy
        self._experts = {layer.layer: layer.experts for layer in package.manifest.layers}
        self._slot_bytes = slot_bytes(package.manifest)
        self._resident: dict[ExpertKey, Slot] = {}
        self._free: list[Slot] = []
        self._verified: set[ExpertKey] = set()
        self._pinned_slots = 0
        self._released = threading.Condition()

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """A step of `layer` begins: for each token, oldest first, the experts it will acquire."""
        with self._released:
            self._policy.routed(layer, tokens)
            if self.recorder:
                self.recorder(layer, tokens)

    def acquire(self, layer: int, experts: Sequence[int]) -> list[Slot]:
        """The slots of these experts of one layer, pinned until `release`.

        Raises `GraphError` unless they are different experts of the layer, `ShardDigestError`
        if a shard is not what the manifest says, or whatever the store raises; nothing is
        pinned then.
        """
        self._check(layer, experts)
        keys = [(layer, expert) for expert in experts]
        with self._released:
            while not self._fits(keys):
                self._released.wait()
            pinned: list[Slot] = []
            try:
                # Pin what is there first, so that reading the others cannot evict it.
                missing = [key for key in keys if key not in self._resident]
                for key in keys:
                    if key in self._resident:
                        self._pin(self._resident[key], pinned)
                for key in missing:
                    self._pin(self._page_in(key), pinned)
            except BaseException:
                self._unpin(pinned)
                raise
            for key in keys:
                self._policy.touched(key)
                self.pages[key].hits += 1
            for key in missing:
                self.pages[key].hits -= 1
                self.pages[key].misses += 1
            self.counters.misses += len(missing)
            self.counters.hits += len(keys) - len(missing)
            return [self._resident[key] for key in keys]

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

    def _check(self, layer: int, experts: Sequence[int]) -> None:
        """A router's answer comes from a graph: trust it no more than any file."""
        count = self._experts[layer]
        if len(set(experts)) != len(experts) or min(experts) < 0 or max(experts) >= count:
            raise GraphError(
                f"{self._package.location}: layer {layer}: expected the router to choose "
                f"different experts from 0 to {count - 1}, found {list(experts)}"
            )

    def _pin(self, slot: Slot, pinned: list[Slot]) -> None:
        self._pinned_slots += slot.pins == 0
        slot.pins += 1
        pinned.append(slot)

    def _unpin(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            slot.pins -= 1
            assert slot.pins >= 0, "a slot was released twice"
            self._pinned_slots -= slot.pins == 0
        self._released.notify_all()

    def _fits(self, keys: Sequence[ExpertKey]) -> bool:
        """Whether `keys` fit beside what other requests have pinned."""
        slots = (self._resident.get(key) for key in keys)
        new = sum(slot is None or slot.pins == 0 for slot in slots)
        return (self._pinned_slots + new) * self._slot_bytes <= self.budget

    def _page_in(self, key: ExpertKey) -> Slot:
        """Read one expert into a slot."""
        slot = self._take_slot()
        try:
            started = time.perf_counter()
            self._read(key, slot)
            slot.upload()
            self.counters.read_seconds += time.perf_counter() - started
        except BaseException:
            self._free.append(slot)
            raise
        self._resident[key] = slot
        self._policy.touched(key)
        return slot

    def _take_slot(self) -> Slot:
        """A free slot, a new one while the budget allows, or a victim's."""
        if self._free:
            return self._free.pop()
        counters = self.counters
        if counters.resident_bytes + self._slot_bytes <= self.budget:
            slot = self._device.new_slot(self._slot_bytes)
            counters.resident_bytes += self._slot_bytes
            counters.peak_resident_bytes = max(
                counters.peak_resident_bytes, counters.resident_bytes
            )
            return slot
        key = self._policy.victim(lambda key: self._resident[key].pins == 0)
        assert key is not None, "the budget was checked to hold one step"
        slot = self._resident.pop(key)
        self._policy.removed(key)
        counters.evictions += 1
        return slot

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
        self.pages[shard.layer, shard.expert].bytes_read += shard.bytes
