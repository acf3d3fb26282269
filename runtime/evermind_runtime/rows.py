"""The rows of one state that grows, in an array with room for more.

Of a buffer with a window only the last rows count. Once enough others have gathered before them,
the last ones are moved to the front, so that neither memory nor what a graph walks over grows with
the sequence. When that happens depends on how many rows are filled and on nothing else: a state
that was saved, copied or rewound goes on with the same numbers in the same places.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from evermind_manifests.manifest import StateSpec

from .devices import CpuDevice, Device, Place, numpy_dtype

Array = npt.NDArray[Any]

# Rows there is room for at first; the room doubles when it is full.
FIRST_ROWS = 64


def spare_rows(window: int) -> int:
    """How many rows may have left a window before the others are moved.

    Graphs walk over these too, half of them on average, and each token pays for window / spare
    rows moved: an eighth of a window costs little of either.
    """
    return max(FIRST_ROWS, window // 8)


def window_rows(window: int) -> int:
    """How many rows of a state with a window are held at most."""
    return window - 1 + spare_rows(window)


class Rows:
    """The rows so far, the first `count` along one axis of an array.

    A graph may read and write the array in place, or, on another device, a copy of it, which is
    fetched when the host needs it. Whatever breaks off a call, even Ctrl-C, leaves
    the rows as they were, or without those that have left the window.
    """

    def __init__(self, spec: StateSpec, device: Device | None = None) -> None:
        """No rows yet. Graphs have them on the `device`, by default in host memory."""
        self._device = device or CpuDevice()
        self._dtype = spec.dtype
        self._axis = spec.axis
        self._kept = sys.maxsize
        self._most = spec.limit or sys.maxsize
        self._window = bool(spec.window)
        if spec.window:
            self._kept, self._most = spec.window - 1, window_rows(spec.window)
        shape = shape_of(spec, min(FIRST_ROWS, self._most))
        self._held = _Held(np.empty(shape, dtype=numpy_dtype(spec.dtype)), 0)
        # Whether a mark refers to the array, which then must stay as it is.
        self._marked = False

    @property
    def count(self) -> int:
        """How many there are."""
        return self._settled().count

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array, filled or not."""
        return self._settled().array.shape

    @property
    def place(self) -> Place:
        """Where graphs read and write the whole array, filled or not; another if it has moved."""
        held = self._settled()
        if held.place is None:
            held.place = self._device.place(held.array, self._dtype)
        return held.place

    def view(self) -> Array:
        """The rows so far."""
        held = self._on_host()
        return held.array[self._span(0, held.count)]

    def write(self, rows: Array) -> int:
        """Put `rows` behind those there are; how many there will be once they are filled."""
        self.reserve(rows.shape[self._axis])
        held = self._on_host()
        held.place = None
        count: int = held.count + rows.shape[self._axis]
        held.array[self._span(held.count, count)] = rows
        return count

    def fill(self, count: int) -> None:
        """There are so many now: what `write` or a graph put behind the others counts."""
        if self._held.place is not None:
            self._held.place.ahead = True
        self._held.count = count

    def clear(self) -> None:
        """None are there."""
        self._held = _Held(self._held.array, 0)

    def reserve(self, rows: int) -> None:
        """Have room for that many more; `place` is another one if the array had to move."""
        held = self._settled()
        forget = held.count - self._kept if self._window and held.count > self._most else 0
        count, room = held.count - forget, held.array.shape[self._axis]
        needed = max(count + rows, min(2 * room, self._most))
        if forget or count + rows > room:
            held = self._on_host()
        if forget and not self._marked and count + rows <= room <= 2 * needed:
            self._held = _Held(held.array, held.count, None, forget)
            self._settled()
        elif forget or count + rows > room:
            shape = list(held.array.shape)
            shape[self._axis] = needed
            larger = np.empty(shape, held.array.dtype)
            larger[self._span(0, count)] = held.array[self._span(forget, held.count)]
            self._held = _Held(larger, count)
            self._marked = False

    def mark(self) -> tuple[Array | None, int]:
        """Where it is now; with the array, if rows that this takes may be forgotten later."""
        held = self._settled()
        if not self._window or not held.count:
            return None, held.count
        self._on_host()
        self._marked = True
        return held.array, held.count

    def rewind(self, mark: tuple[Array | None, int]) -> None:
        """Go back to a mark, made before what has been added since."""
        array, count = mark
        held = self._settled()
        if array is None or array is held.array:
            self._held = _Held(held.array, count, held.place)
        else:
            self._marked = True
            self._held = _Held(array, count)

    def _on_host(self) -> _Held:
        """What is held, with what graphs wrote elsewhere."""
        held = self._settled()
        if held.place is not None:
            held.place.pull()
        return held

    def _settled(self) -> _Held:
        """What is held, once a move that was begun has come to its end.

        Rows are moved in pieces that do not overlap: whatever breaks it off, it can go on.
        """
        while (held := self._held).forget:
            begin = held.forget + held.moved
            more = min(held.forget, held.count - begin)
            if more > 0:
                rows = held.array[self._span(begin, begin + more)]
                held.array[self._span(held.moved, held.moved + more)] = rows
                held.moved += more
            else:
                self._held = _Held(held.array, held.count - held.forget, held.place)
        return held

    def _span(self, begin: int, end: int) -> tuple[slice, ...]:
        return (*(slice(None),) * self._axis, slice(begin, end))


class _Held:
    """An array, how many of its rows are filled, and of these to `forget` the first so many.

    `moved` rows behind those are at the front already.
    """

    __slots__ = ("array", "count", "forget", "moved", "place")

    def __init__(
        self, array: Array, count: int, place: Place | None = None, forget: int = 0
    ) -> None:
        self.array = array
        self.count = count
        self.place = place
        self.forget = forget
        self.moved = 0


def shape_of(spec: StateSpec, rows: int) -> tuple[int, ...]:
    """The shape of a state with so many rows."""
    return tuple(rows if isinstance(dim, str) else dim for dim in spec.shape)
