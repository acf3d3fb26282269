"""State: what a sequence carries from call to call, in the caller's hands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Plan, StateSpec

from .devices import CpuDevice, Device, numpy_dtype
from .rows import Array as Array
from .rows import Rows, shape_of


class Mark(NamedTuple):
    """Where a state was: `State.rewind` goes back there.

    Cheap, as nothing that grew is copied. While it is kept, what a window forgets is kept with it:
    up to as much memory again as buffers with windows take.
    """

    fixed: dict[str, Array]
    rows: dict[str, tuple[Array | None, int]]


class State:
    """The named arrays of one sequence. Use one State in one call at a time.

    Every value of fixed shape has two sides: a step reads the current arrays and writes the
    others, then `take_over` makes those current. Their addresses never change, so bindings to
    them last. A growing value has one array, in which new rows are written behind what is there;
    it moves when it is full. A buffer has one array too, read and written by a graph in place,
    behind the filled rows; what a failed step wrote there counts for nothing. `reserve` moves it,
    and forgets what has left a window.
    """

    def __init__(self, plan: Plan, device: Device | None = None) -> None:
        """A fresh state: every value filled with its `init`, those that grow without rows.

        Graphs have its buffers on `device`, by default in host memory.
        """
        self._specs = plan.state
        self._device = device or CpuDevice()
        self.sides: tuple[dict[str, Array], dict[str, Array]] = (self._filled(), self._filled())
        self.side = 0
        self.grown, self.buffers = _rows(plan.state, self._device)
        #: How many rows of buffers are filled, as the blackboard has it.
        self.lengths: dict[str, Array] = {name: np.zeros(1, np.int64) for name in plan.lengths}
        # The decode executor keeps its bindings to these arrays here.
        self.bindings: Any = None

    @property
    def current(self) -> dict[str, Array]:
        """The arrays the next step reads, by name; they are the state's own memory.

        Of buffers the filled rows.
        """
        return self.readable | {name: one.view() for name, one in self.buffers.items()}

    @property
    def readable(self) -> dict[str, Array]:
        """The same without buffers, which graphs have where they are."""
        return self.sides[self.side] | {name: one.view() for name, one in self.grown.items()}

    def save(self) -> dict[str, Array]:
        """Copies of the arrays, to be kept or stored."""
        return {name: array.copy() for name, array in self.current.items()}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Take over saved arrays. Raises `InputError` unless names, dtypes and shapes fit."""
        self._check(arrays, self._specs)
        self._check_lengths(arrays)
        self._check_windows(arrays)
        for rows in (*self.grown.values(), *self.buffers.values()):
            rows.clear()
        self._take(arrays)

    def mark(self) -> Mark:
        """Where the state is now."""
        rows = {**self.grown, **self.buffers}
        fixed = {name: array.copy() for name, array in self.sides[self.side].items()}
        return Mark(fixed, {name: one.mark() for name, one in rows.items()})

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark of this state, made before what has been appended since."""
        for name, array in mark.fixed.items():
            self.sides[self.side][name][...] = array
        for name, rows in {**self.grown, **self.buffers}.items():
            rows.rewind(mark.rows[name])
        self._tell()

    def advance(self, arrays: Mapping[str, Array], tokens: int) -> None:
        """Take over what a program wrote for `tokens`: the new values, and the new rows of what
        grows; a buffer has them already.

        Raises `InputError`, and changes nothing, unless they fit.
        """
        written = {name: spec for name, spec in self._specs.items() if not spec.is_buffer}
        self._check(arrays, written)
        self.check_room(max((len(arrays[name]) for name in self.grown), default=tokens))
        for name, array in self.sides[1 - self.side].items():
            array[...] = arrays[name]
        self.take_over(arrays, tokens)

    def take_over(self, rows: Mapping[str, Array], tokens: int) -> None:
        """Make the side that was written current, with the new `rows`, which fit, of what grows
        and so many more of every buffer; Ctrl-C finds all of it done or nothing.
        """
        counts = [(one, one.count + tokens) for one in self.buffers.values()]
        for name, grown in self.grown.items():
            counts.append((grown, grown.write(rows[name])))
        side = 1 - self.side
        try:
            self._commit(counts, side)
        except BaseException:
            self._commit(counts, side)
            raise

    def _commit(self, counts: Sequence[tuple[Rows, int]], side: int) -> None:
        for rows, count in counts:
            rows.fill(count)
        self._tell()
        self.side = side

    def reserve(self, rows: int) -> None:
        """Have room for that many more rows in every buffer."""
        for buffer in self.buffers.values():
            buffer.reserve(rows)
        self._tell()

    def check_room(self, rows: int) -> None:
        """Raise `InputError` if so many more tokens are more than the state can take."""
        for name, spec in self._specs.items():
            if spec.limit and (held := self._held(name, spec)) + rows > spec.limit:
                raise InputError(
                    f"state {name!r}: expected at most {spec.limit:,} tokens in all, found "
                    f"{held:,} and {rows:,} more",
                    hint="Start a new state, with fewer of the earlier tokens.",
                )

    @property
    def room(self) -> int | None:
        """How many more tokens it can take; `None` where nothing limits them."""
        limited = [(name, spec) for name, spec in self._specs.items() if spec.limit]
        left = ((spec.limit or 0) - self._held(name, spec) for name, spec in limited)
        return min(left, default=None)

    def _held(self, name: str, spec: StateSpec) -> int:
        """The tokens that a limited value counts."""
        if spec.grows:
            return (self.grown.get(name) or self.buffers[name]).count
        return int(self.sides[self.side][name][0])

    def fits(self, plan: Plan, device: str) -> bool:
        """Whether this is a state of that plan (the same names, dtypes and shapes) and device."""
        return self._specs == plan.state and self._device.name == device

    @property
    def fresh(self) -> bool:
        """Whether it holds what a new state does: no token has left a trace."""
        rows = {**self.grown, **self.buffers}
        fixed = self.sides[self.side]
        return not any(
            rows[name].count if spec.grows else (fixed[name] != spec.init).any()
            for name, spec in self._specs.items()
        )

    def copy(self) -> State:
        """An independent state with the same content."""
        twin = State.__new__(State)
        twin._specs = self._specs
        twin.sides = (twin._filled(), twin._filled())
        twin.side = 0
        twin._device = self._device
        twin.grown, twin.buffers = _rows(self._specs, self._device)
        twin.lengths = {name: np.zeros(1, np.int64) for name in self.lengths}
        twin.bindings = None
        twin._take(self.current)
        return twin

    def _check(self, arrays: Mapping[str, Array], specs: Mapping[str, StateSpec]) -> None:
        if arrays.keys() != specs.keys():
            raise InputError(f"state: expected {_names(specs)}, found {_names(arrays)}")
        for name, spec in specs.items():
            array = arrays[name]
            expected = np.dtype(numpy_dtype(spec.dtype))
            fits = np.can_cast(array.dtype, expected, casting="same_kind")
            fits = fits and array.ndim == len(spec.shape)
            rows = array.shape[spec.axis] if fits and spec.grows else 0
            if not fits or array.shape != shape_of(spec, rows):
                raise InputError(
                    f"state {name!r}: expected {expected} {_dims(spec)}, "
                    f"found {array.dtype} {array.shape}"
                )
            if spec.limit and rows > spec.limit:
                raise InputError(
                    f"state {name!r}: expected at most {spec.limit:,} rows, found {rows:,}"
                )
            if spec.is_counter and not 0 <= int(array[0]) <= int(spec.limit or 0):
                raise InputError(
                    f"state {name!r}: expected 0 to {spec.limit:,} tokens, found {int(array[0]):,}"
                )

    def _check_lengths(self, arrays: Mapping[str, Array]) -> None:
        first: dict[str, str] = {}
        for name in self.buffers:
            spec = self._specs[name]
            other = first.setdefault(str(spec.length), name)
            counts = [arrays[one].shape[self._specs[one].axis] for one in (other, name)]
            if counts[0] != counts[1]:
                raise InputError(
                    f"state {name!r}: expected {counts[0]:,} rows as {other!r} has, "
                    f"found {counts[1]:,}"
                )

    def _check_windows(self, arrays: Mapping[str, Array]) -> None:
        """Nothing that a window still needs is missing."""
        tokens = None
        for name, spec in self._specs.items():
            if spec.grows and not spec.window:
                tokens = arrays[name].shape[spec.axis]
            elif spec.is_counter:
                tokens = int(arrays[name][0])
        for name, spec in self._specs.items():
            if spec.window and tokens is not None:
                rows, least = arrays[name].shape[spec.axis], min(tokens, spec.window - 1)
                if not least <= rows <= tokens:
                    raise InputError(
                        f"state {name!r}: expected {least:,} to {tokens:,} rows of {tokens:,} "
                        f"tokens, found {rows:,}"
                    )

    def _take(self, arrays: Mapping[str, Array]) -> None:
        for name, array in self.sides[self.side].items():
            array[...] = arrays[name]
        for name, rows in (*self.grown.items(), *self.buffers.items()):
            rows.fill(rows.write(arrays[name]))
        self._tell()

    def _tell(self) -> None:
        for name, buffer in self.buffers.items():
            self.lengths[str(self._specs[name].length)][0] = buffer.count

    def _filled(self) -> dict[str, Array]:
        return {
            name: np.full(spec.fixed, spec.init, dtype=numpy_dtype(spec.dtype))
            for name, spec in self._specs.items()
            if not spec.grows
        }


def _rows(
    specs: Mapping[str, StateSpec], device: Device
) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Those that the runtime appends to, and the buffers; all empty."""
    rows = {name: Rows(spec, device) for name, spec in specs.items() if spec.grows}
    buffers = {name: one for name, one in rows.items() if specs[name].is_buffer}
    return {name: one for name, one in rows.items() if name not in buffers}, buffers


def _dims(spec: StateSpec) -> str:
    return (
        "("
        + ", ".join(str(dim) for dim in spec.shape)
        + ("," if len(spec.shape) == 1 else "")
        + ")"
    )


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(sorted(mapping)) or "no arrays"
