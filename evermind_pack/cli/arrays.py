"""Arrays and states in `.npz` files: what `run --inputs` reads and writes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import InputError
from evermind_runtime import Model, State
from evermind_runtime.arrays import by_plan_names

from .targets import open_target

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


def read_arrays(path: Path) -> Arrays:
    """Every array of an `.npz` file; pickled objects are refused. Raises `InputError`."""
    try:
        # numpy takes what is no archive for a pickle, and says how to load it unsafely.
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("expected an archive, found something else")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    # Damage fails in ways of zipfile, zlib and numpy, a size that was made up as MemoryError.
    except Exception as error:
        raise InputError(f"{path}: cannot be read as .npz: {error}") from error


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write an `.npz` file, whole or not at all; a link is written through."""
    with open_target(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_states(model: Model, path: Path | None, inputs: Arrays) -> State | list[State]:
    """The state to start from: one, or one per row where the inputs have a batch axis.

    A stored state of a batch has the same leading axis on each of its arrays. What the file
    leaves out starts fresh.
    """
    batch = _batch(model, inputs)
    states = [model.new_state() for _ in range(1 if batch is None else batch)]
    if path is not None:
        arrays = read_arrays(path)
        if batch is None:
            restore_state(states[0], arrays)
        else:
            for name, array in arrays.items():
                if array.ndim == 0 or len(array) != batch:
                    raise InputError(
                        f"{path}: {name}: expected a batch axis of {batch}, found {array.shape}"
                    )
            for row, state in enumerate(states):
                restore_state(state, {name: array[row] for name, array in arrays.items()})
    return states[0] if batch is None else states


def restore_state(state: State, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Take over stored arrays; what is not among them stays as it is. Raises `InputError`."""
    state.restore({**state.save(), **arrays})


def write_states(path: Path, states: State | Sequence[State]) -> None:
    """Store one state, or a batch of them stacked."""
    if isinstance(states, State):
        write_arrays(path, states.save())
        return
    saved = [state.save() for state in states]
    write_arrays(path, {name: np.stack([one[name] for one in saved]) for name in saved[0]})


def _batch(model: Model, inputs: Arrays) -> int | None:
    plan = model.manifest.plan
    for name, array in by_plan_names(plan, inputs).items():
        if name in plan.inputs and array.ndim == len(plan.inputs[name].shape) + 1:
            return len(array)
    return None
