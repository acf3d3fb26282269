"""Paging left to the system: the runtime's own graphs over shards that are mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import evermind_runtime as em
import numpy as np
from evermind_runtime.devices import CpuSlot, Slot


def shard_files(model: em.Model, package: str | Path) -> dict[tuple[int, int], Path]:
    """The file of every (layer, expert) of a package whose shards have a file each."""
    shards = model.manifest.shards
    return {(shard.layer, shard.expert): Path(package) / shard.file for shard in shards}


def map_experts(model: em.Model, package: str | Path) -> None:
    """From now on `model`, opened from `package`, computes on its mapped shards."""
    model._engine.pager.close()
    model._engine.pager = _MappedPager(shard_files(model, package))  # type: ignore[assignment]


class _MappedPager:
    """Stands in for the pager: slots are the mapped files themselves, and the system pages."""

    def __init__(self, paths: Mapping[tuple[int, int], Path]) -> None:
        self._slots: dict[tuple[int, int], Slot] = {
            key: CpuSlot(np.memmap(path, np.uint8, mode="r")) for key, path in paths.items()
        }

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        pass

    def guesses(self, layer: int) -> bool:
        return False

    def expect(self, layer: int, experts: Sequence[int]) -> list[Sequence[int]]:
        return [experts]

    def acquire(self, layer: int, experts: Sequence[int]) -> AbstractContextManager[list[Slot]]:
        return nullcontext([self._slots[layer, expert] for expert in experts])

    def close(self) -> None:
        self._slots.clear()
