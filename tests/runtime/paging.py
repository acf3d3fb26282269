"""What tests of paging ask of any model: the same bits, and nothing left under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import evermind_runtime as em
from evermind_runtime import onnx_runtime

# Polls of a millisecond, and not a deadline: a process that was stopped meanwhile gets them all.
_POLLS = 30_000


def same_bits(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def poll(reached: Callable[[], object]) -> None:
    """Wait until it is; fails if it never is."""
    for _ in range(_POLLS):
        if reached():
            return
        time.sleep(0.001)
    raise AssertionError("waited in vain")


def settle(model: em.Model) -> None:
    """Wait until nothing is being read and no thread of the pool is taken."""
    poll(lambda: not model._pager.slots.loading and not onnx_runtime._workers_taken)


def check_idle(model: em.Model) -> None:
    """No pin, no read, no taken thread, and every slot in its one place."""
    settle(model)
    # What the next one who needs room would do first.
    model._pager._reclaim()
    table = model._pager.slots
    assert table.pinned == 0
    assert all(slot.pins == 0 for slot in table.all)
    lying = [*table.resident.values(), *table._free]
    assert sorted(map(id, lying)) == sorted(map(id, table.all))
    assert all(slot.valid for slot in table.resident.values())
    assert len(table.all) * table.all[0].bytes <= model.budget if table.all else True
    assert not model._pager._waiting
    assert model._pager._demands == 0
