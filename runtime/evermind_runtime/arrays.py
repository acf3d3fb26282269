"""Inputs from a caller, checked against the plan before anything runs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Plan, ValueSpec

from .devices import numpy_dtype
from .state import Array

T = TypeVar("T")

#: Tokens per prefill chunk: bounds the memory of intermediate values. Not tied to the budget,
#: so that a paged run multiplies the same matrices as an unpaged one.
PREFILL_CHUNK: Final = 512


def check_inputs(
    plan: Plan, arrays: Mapping[str, npt.ArrayLike]
) -> tuple[dict[str, Array], int | None]:
    """The plan's inputs as arrays of its dtypes, and the batch size if they have a batch axis.

    Every input may have one more leading axis than the plan says (then all must). An input
    with a default may be left out, and one may be given under an alias. Raises `InputError`
    naming the input, what was expected and what was found.
    """
    arrays = by_plan_names(plan, arrays)
    unknown = sorted(arrays.keys() - plan.inputs.keys())
    missing = [
        name for name, spec in plan.inputs.items() if name not in arrays and spec.default is None
    ]
    if unknown or missing:
        raise InputError(
            f"inputs: expected {_signature(plan)}, found {', '.join(sorted(arrays)) or 'none'}"
        )
    given = {name: _typed(name, plan.inputs[name], arrays[name]) for name in arrays}
    extra = {array.ndim - len(plan.inputs[name].shape) for name, array in given.items()}
    if extra not in ({0}, {1}):
        raise InputError(
            f"inputs: expected {_signature(plan)}, with or without one batch axis before all, "
            f"found {', '.join(f'{name} {array.shape}' for name, array in given.items())}"
        )
    batched = extra == {1}
    sizes: dict[str, int] = {}
    for name, array in given.items():
        shape = (("batch",) if batched else ()) + plan.inputs[name].shape
        for expected, found in zip(shape, array.shape, strict=True):
            size = sizes.setdefault(expected, found) if isinstance(expected, str) else expected
            # No tokens at all is a sequence too; no rows, or no features, is a mistake.
            if size != found or (found == 0 and expected != "T"):
                raise InputError(
                    f"input {name!r}: expected shape {_dims(shape, sizes)}, found {array.shape}"
                )
        _check_limit(name, plan.inputs[name], array)
    for name, spec in plan.inputs.items():
        if name not in given:
            shape = (("batch",) if batched else ()) + spec.shape
            filled = [sizes[dim] if isinstance(dim, str) else dim for dim in shape]
            given[name] = np.full(filled, spec.default, dtype=numpy_dtype(spec.dtype))
    return given, sizes.get("batch")


def by_plan_names(plan: Plan, arrays: Mapping[str, T]) -> dict[str, T]:
    """`arrays` with the names the plan gives its inputs in place of their aliases.

    Raises `InputError` if an input is given under two names.
    """
    names = {alias: name for name, spec in plan.inputs.items() for alias in spec.aliases}
    given: dict[str, T] = {}
    for name, array in arrays.items():
        own = names.get(name, name)
        if own in given:
            raise InputError(f"inputs: {own!r} is given twice, once as {name!r}")
        given[own] = array
    return given


def join_tokens(spec: ValueSpec, parts: Sequence[Array]) -> Array:
    """An output of consecutive tokens: joined where it has an axis of tokens, else the last."""
    if "T" not in spec.shape:
        return parts[-1]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=spec.shape.index("T"))


def tokens_in(plan: Plan, inputs: Mapping[str, Array]) -> int:
    """T: the length of the axis the plan calls by that name."""
    for name, spec in plan.inputs.items():
        if name in inputs and "T" in spec.shape:
            return int(inputs[name].shape[spec.shape.index("T")])
    return 1


def empty_output(spec: ValueSpec) -> Array:
    """The output of no tokens: its shape with T = 0."""
    shape = [0 if isinstance(dim, str) else dim for dim in spec.shape]
    return np.zeros(shape, dtype=numpy_dtype(spec.dtype))


def slice_tokens(plan: Plan, inputs: Mapping[str, Array], begin: int, end: int) -> dict[str, Array]:
    """The inputs for tokens `begin` to `end` (exclusive)."""
    return {
        name: inputs[name][
            tuple(slice(begin, end) if dim == "T" else slice(None) for dim in spec.shape)
        ]
        for name, spec in plan.inputs.items()
    }


def _typed(name: str, spec: ValueSpec, value: npt.ArrayLike) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"input {name!r}: not an array: {error}") from error
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(numpy_dtype(spec.dtype))  # numpy calls an empty list floats
    dtype = np.dtype(numpy_dtype(spec.dtype))
    # Floats may change precision and integers width; a float is never taken for an id.
    truths = array.dtype == np.bool_ and dtype != np.bool_
    if truths or not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise InputError(f"input {name!r}: expected {dtype}, found {array.dtype}")
    return np.asarray(array, dtype=dtype, order="C")


def _check_limit(name: str, spec: ValueSpec, array: Array) -> None:
    if spec.limit is None:
        return
    bad = np.flatnonzero((array < 0) | (array >= spec.limit))
    if len(bad):
        raise InputError(
            f"input {name!r}: expected values from 0 to {spec.limit - 1}, "
            f"found {array.ravel()[bad[0]]} at position {bad[0]}"
        )


def _signature(plan: Plan) -> str:
    return ", ".join(
        f"{name} {spec.dtype} {_dims(spec.shape, {})}" for name, spec in plan.inputs.items()
    )


def _dims(shape: tuple[Any, ...], sizes: Mapping[str, int]) -> str:
    return "(" + ", ".join(str(sizes.get(dim, dim)) for dim in shape) + ")"
