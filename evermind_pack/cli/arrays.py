"""Arrays and states in `.npz` files: what `run --inputs` reads and writes."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SCHEMA
from evermind_runtime import Model, State
from evermind_runtime.arrays import by_plan_names

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


def check_targets(*paths: Path | None, sources: Sequence[str | Path | None] = ()) -> None:
    """Raise `InputError` before anything is computed if a result could not be written.

    Nor may one take the place of `sources`, what is read, or of a file of any package.
    """
    targets = [_target(path) for path in paths if path is not None]
    if len(set(targets)) < len(targets):
        raise InputError(f"{targets[0]}: expected a file of its own for each result")
    read = [Path(os.path.realpath(source)) for source in sources if source is not None]
    for target in targets:
        if target in read:
            raise InputError(f"{target}: it is what is read: expected another file to write")
        for folder in target.parents:
            if folder in read or _is_package(folder):
                raise InputError(
                    f"{target}: it would be a file of the package {folder}",
                    hint="Write it elsewhere: a package holds what its manifest.json lists, "
                    "and changed it is damaged.",
                )


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write an `.npz` file, whole or not at all; a link is written through."""
    with _replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; a link is written through."""
    with _replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole. Raises `InputError`."""
    target = _target(path)
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _is_package(folder: Path) -> bool:
    """Whether a folder's manifest.json is a package's, and not a web page's, say."""
    try:
        with (folder / MANIFEST_NAME).open("rb") as file:
            return SCHEMA.encode() in file.read(MAX_MANIFEST_BYTES)
    except OSError:
        return False


def _target(path: Path) -> Path:
    """The file that `path` means, behind any links; it can be written or replaced."""
    target = Path(os.path.realpath(path))
    try:
        # A loop of links, and a name too long, fail here.
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(target.stat().st_mode):
                raise InputError(f"{path}: expected a regular file, found something else")
        if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
            raise InputError(f"{path}: its folder is not there, or cannot be written to")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return target


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
