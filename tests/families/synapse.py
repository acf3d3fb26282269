"""Packages of the Synapse golden cases, and how the seed runs them."""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import evermind_runtime as em
import numpy as np
from evermind_exporters import read_source

from tests.golden_families import Arrays, FamilyCase, family_case
from tests.packages import export, write_model


def write_source(case: FamilyCase, folder: Path, **config: Any) -> Path:
    """The case as a state dict with its config.json."""
    return write_model(folder, {**case.config, "family": "synapse", **config}, case.weights)


@cache
def package(name: str, dtype: str = "f32") -> Path:
    """The package of a golden case; its module is told by the tensors."""
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = read_source(write_source(family_case(f"synapse_{name}"), folder / "source"))
    return export(source, folder / "package", parity=True, dtype=dtype)


def forget_window(states: Iterable[em.State]) -> None:
    """The seed's convolution starts from nothing at every call."""
    for state in states:
        saved = state.save()
        state.restore({name: array * (not is_window(name)) for name, array in saved.items()})


def share_memory(states: Sequence[em.State]) -> None:
    """In the seed one memory serves all rows of a batch, and row 0 writes it."""
    memories = {n: a for n, a in states[0].save().items() if n.startswith("fast_weights")}
    for state in states[1:]:
        state.restore({**state.save(), **memories})


def is_window(name: str) -> bool:
    return name.startswith("conv_window")


def lockstep(
    model: em.Model,
    inputs: Mapping[str, np.ndarray],
    states: Sequence[em.State],
    output: str,
    *,
    window: bool = True,
) -> np.ndarray:
    """A batch as the seed runs it: token by token, all rows with one memory.

    Without `window` every token is a call of its own, and begins without one.
    """
    tokens = next(iter(inputs.values())).shape[1]
    parts = []
    for step in range(tokens):
        if not window:
            forget_window(states)
        now = {name: array[:, step : step + 1] for name, array in inputs.items()}
        parts.append(model.forward(now, state=states, steps="decode")[output])
        share_memory(states)
    return np.concatenate(parts, axis=1)


def suffixed(arrays: Arrays, names: Iterable[str], suffix: str) -> Arrays:
    """The arrays `{name}{suffix}` by name."""
    return {name: arrays[name + suffix] for name in names}
