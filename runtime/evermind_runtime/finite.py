"""Infinities and NaNs in what must stay finite: found early, named with their usual cause."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Final

import numpy as np
from evermind_manifests.errors import NonFiniteError
from evermind_manifests.manifest import Plan

from .state import Array

# Longer dot products are shared with threads, which take longer to wake.
_BLOCK: Final = 8192
_F32: Final = np.dtype(np.float32)


class FiniteCheck:
    """The states and outputs of one plan that must stay finite; costs nothing if there are none."""

    def __init__(self, plan: Plan) -> None:
        # In the order of layers: what one of them spoils, those after it only pass on.
        names = sorted(plan.state, key=_layer)
        states = {name: plan.state[name].finite for name in names}
        self._states = {name: cause for name, cause in states.items() if cause}
        self._outputs = {
            spec.value or name: (name, spec.finite)
            for name, spec in plan.outputs.items()
            if spec.finite
        }
        self._inputs = [name for name, spec in plan.inputs.items() if spec.dtype == "f32"]

    def check(self, values: Mapping[str, Array]) -> None:
        """Raise `NonFiniteError` for the first of `values` (by blackboard name) that is not.

        States first: what became of an output begins there. The inputs are looked at only to
        tell the cause.
        """
        if not self._states and not self._outputs:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            for name, cause in self._states.items():
                if name in values and not _finite(values[name]):
                    raise self._error("state", name, values, name, str(cause))
            for value, (name, cause) in self._outputs.items():
                if value in values and not _finite(values[value]):
                    raise self._error("output", name, values, value, cause)

    def _error(
        self, kind: str, name: str, values: Mapping[str, Array], value: str, usual: str
    ) -> NonFiniteError:
        array = values[value]
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        given = [one for one in self._inputs if one in values and not _finite(values[one])]
        cause = f"usually {usual}"
        hint = (
            "The state is as it was before the call; start the sequence anew, or look at the "
            "weights (`validate --deep`) and how the model was trained."
        )
        if given:
            cause = f"input {given[0]!r} is not finite itself"
            hint = "The state is as it was before the call; give finite numbers."
        return NonFiniteError(
            f"{kind} {name!r}: expected finite numbers, found {bad:,} of {array.size:,} infinite "
            f"or NaN; {cause}",
            hint=hint,
        )


def _layer(name: str) -> tuple[int, str]:
    number = name.rpartition(".")[2]
    return (int(number), name) if number.isdecimal() else (-1, name)


def _finite(array: Array) -> bool:
    flat = array.reshape(-1)
    if flat.dtype != _F32:
        return bool(np.isfinite(flat).all())
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        # A sum of squares is finite if all of them are, and cancels nothing; what is finite may
        # overflow in it.
        if not isfinite(block.dot(block)) and not np.isfinite(block).all():
            return False
    return True
