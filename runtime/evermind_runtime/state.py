"""State: what a sequence carries from call to call, in the caller's hands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Plan, StateSpec

from .devices import numpy_dtype

Array = npt.NDArray[Any]

# Rows a growing value has room for at first; the room doubles when it is full.
_FIRST_ROWS = 64


class State:
    """The named arrays of one sequence. Use one State in one call at a time.

    Every value of fixed shape has two buffers: a step reads the current ones and writes the
    others, then `flip` makes those current. Their addresses never change, so bindings to
    them last. A growing value has one buffer, which `append` writes behind what is there;
    it moves when it is full.
    """

    def __init__(self, plan: Plan) -> None:
        """A fresh state: every value filled with its `init`, those that grow without rows."""
        self._specs = plan.state
        self.buffers: tuple[dict[str, Array], dict[str, Array]] = (
            self._filled(),
            self._filled(),
        )
        self.side = 0
        self.grown = {name: _Rows(spec) for name, spec in plan.state.items() if spec.grows}
        # The decode executor keeps its bindings to these buffers here.
        self.bindings: Any = None

    @property
    def current(self) -> dict[str, Array]:
        """The arrays the next step reads, by name; they are the state's own memory."""
        arrays = self.buffers[self.side]
        return arrays | {name: rows.view() for name, rows in self.grown.items()}

    def flip(self) -> None:
        """Make what was written last current."""
        self.side = 1 - self.side

    def save(self) -> dict[str, Array]:
        """Copies of the arrays, to be kept or stored."""
        return {name: array.copy() for name, array in self.current.items()}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Take over saved arrays. Raises `InputError` unless names, dtypes and shapes fit."""
        self._check(arrays)
        for rows in self.grown.values():
            rows.clear()
        self._take(arrays)

    def advance(self, arrays: Mapping[str, Array]) -> None:
        """Take over what a program wrote: the new values, and the new rows of what grows.

        Raises `InputError`, and changes nothing, unless they fit.
        """
        self._check(arrays)
        self.check_room(max((len(arrays[name]) for name in self.grown), default=0))
        self._take(arrays)

    def append(self, rows: Mapping[str, Array]) -> None:
        """Add rows, which fit, to every growing value."""
        for name, grown in self.grown.items():
            grown.append(rows[name])

    def check_room(self, rows: int) -> None:
        """Raise `InputError` if a growing value cannot take that many more rows."""
        for name, grown in self.grown.items():
            limit = self._specs[name].limit
            if limit and grown.count + rows > limit:
                raise InputError(
                    f"state {name!r}: expected at most {limit:,} tokens in all, found "
                    f"{grown.count:,} and {rows:,} more",
                    hint="Start a new state, with fewer of the earlier tokens.",
                )

    def fits(self, plan: Plan) -> bool:
        """Whether this is a state of that plan: the same names, dtypes and shapes."""
        return self._specs == plan.state

    @property
    def fresh(self) -> bool:
        """Whether it holds what a new state does: no token has left a trace."""
        current = self.current
        return not any(
            len(current[name]) if spec.grows else (current[name] != spec.init).any()
            for name, spec in self._specs.items()
        )

    def copy(self) -> State:
        """An independent state with the same content."""
        twin = State.__new__(State)
        twin._specs = self._specs
        twin.buffers = (twin._filled(), twin._filled())
        twin.side = 0
        twin.grown = {name: _Rows(self._specs[name]) for name in self.grown}
        twin.bindings = None
        twin._take(self.current)
        return twin

    def _check(self, arrays: Mapping[str, Array]) -> None:
        if arrays.keys() != self._specs.keys():
            raise InputError(
                f"state: expected {_names(self._specs)}, found {_names(arrays)}",
            )
        for name, spec in self._specs.items():
            array = arrays[name]
            expected = np.dtype(numpy_dtype(spec.dtype))
            fits = np.can_cast(array.dtype, expected, casting="same_kind")
            shape = array.shape[1:] if spec.grows else array.shape
            if not fits or array.ndim != len(spec.shape) or shape != spec.fixed:
                raise InputError(
                    f"state {name!r}: expected {expected} {_dims(spec)}, "
                    f"found {array.dtype} {array.shape}"
                )
            if spec.limit and len(array) > spec.limit:
                raise InputError(
                    f"state {name!r}: expected at most {spec.limit:,} rows, found {len(array):,}"
                )

    def _take(self, arrays: Mapping[str, Array]) -> None:
        for name, array in self.buffers[self.side].items():
            array[...] = arrays[name]
        self.append(arrays)

    def _filled(self) -> dict[str, Array]:
        return {
            name: np.full(spec.fixed, spec.init, dtype=numpy_dtype(spec.dtype))
            for name, spec in self._specs.items()
            if not spec.grows
        }


class _Rows:
    """The rows of one growing value, in a buffer with room for more."""

    def __init__(self, spec: StateSpec) -> None:
        self.count = 0
        self._buffer = np.empty((_FIRST_ROWS, *spec.fixed), dtype=numpy_dtype(spec.dtype))

    def view(self) -> Array:
        """The rows so far `(C, …)`."""
        return self._buffer[: self.count]

    def clear(self) -> None:
        """Forget all rows."""
        self.count = 0

    def append(self, rows: Array) -> None:
        """Add `rows` `(T, …)`."""
        end = self.count + len(rows)
        if end > len(self._buffer):
            larger = np.empty(
                (max(end, 2 * len(self._buffer)), *rows.shape[1:]), self._buffer.dtype
            )
            larger[: self.count] = self.view()
            self._buffer = larger
        self._buffer[self.count : end] = rows
        self.count = end


def _dims(spec: StateSpec) -> str:
    return (
        "("
        + ", ".join(str(dim) for dim in spec.shape)
        + ("," if len(spec.shape) == 1 else "")
        + ")"
    )


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(sorted(mapping)) or "no arrays"
