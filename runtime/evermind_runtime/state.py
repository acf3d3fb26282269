"""State: what a sequence carries from call to call, in the caller's hands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Plan

from .devices import numpy_dtype

Array = npt.NDArray[Any]


class State:
    """The named arrays of one sequence. Use one State in one call at a time.

    Every value has two buffers: a step reads the current ones and writes the others, then
    `flip` makes those current. Their addresses never change, so bindings to them last.
    """

    def __init__(self, plan: Plan) -> None:
        """A fresh state: every value filled with its `init`."""
        self._specs = plan.state
        self.buffers: tuple[dict[str, Array], dict[str, Array]] = (
            self._filled(),
            self._filled(),
        )
        self.side = 0
        # The decode executor keeps its bindings to these buffers here.
        self.bindings: Any = None

    @property
    def current(self) -> dict[str, Array]:
        """The arrays the next step reads, by name; they are the state's own memory."""
        return self.buffers[self.side]

    def flip(self) -> None:
        """Make what was written last current."""
        self.side = 1 - self.side

    def save(self) -> dict[str, Array]:
        """Copies of the arrays, to be kept or stored."""
        return {name: array.copy() for name, array in self.current.items()}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Take over saved arrays. Raises `InputError` unless names, dtypes and shapes fit."""
        if arrays.keys() != self._specs.keys():
            raise InputError(
                f"state: expected {_names(self._specs)}, found {_names(arrays)}",
            )
        for name, spec in self._specs.items():
            array = arrays[name]
            expected = np.dtype(numpy_dtype(spec.dtype))
            fits = np.can_cast(array.dtype, expected, casting="same_kind")
            if not fits or array.shape != spec.shape:
                raise InputError(
                    f"state {name!r}: expected {expected} {spec.shape}, "
                    f"found {array.dtype} {array.shape}"
                )
        for name, array in arrays.items():
            self.current[name][...] = array

    def fits(self, plan: Plan) -> bool:
        """Whether this is a state of that plan: the same names, dtypes and shapes."""
        return self._specs == plan.state

    def copy(self) -> State:
        """An independent state with the same content."""
        twin = State.__new__(State)
        twin._specs = self._specs
        twin.buffers = (self.save(), self.save())
        twin.side = 0
        twin.bindings = None
        return twin

    def _filled(self) -> dict[str, Array]:
        return {
            name: np.full(spec.shape, spec.init, dtype=numpy_dtype(spec.dtype))
            for name, spec in self._specs.items()
        }


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(sorted(mapping)) or "no arrays"
