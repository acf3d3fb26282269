"""`validate --run`: does the package compute what its parity file says, on this machine?"""

from __future__ import annotations

import base64
from typing import Literal

import msgspec
import numpy as np
from evermind_manifests.errors import EvermindPackError, ManifestError
from evermind_manifests.package import Package

from .budget import token_cycle_bytes
from .devices import numpy_dtype
from .model import Model, Steps
from .state import Array


class _Array(msgspec.Struct, frozen=True):
    dtype: Literal["f32", "i64"]
    shape: tuple[int, ...]
    data: str

    def decode(self) -> Array:
        raw = base64.b64decode(self.data, validate=True)
        return np.frombuffer(raw, dtype=numpy_dtype(self.dtype)).reshape(self.shape)


class _Case(msgspec.Struct, frozen=True):
    inputs: dict[str, _Array]
    outputs: dict[str, _Array]
    tolerance: float


class _Parity(msgspec.Struct, frozen=True):
    cases: tuple[_Case, ...]


def parity_failures(package: Package) -> list[str]:
    """Run every parity case through both programs; a sentence for each output that is off.

    Integers must be equal, floats within the case's tolerance of the output's largest
    magnitude. Raises `ManifestError` if there is no parity file or it is malformed.
    """
    path = package.manifest.parity
    if path is None:
        raise ManifestError("manifest.json: parity: the package has no parity file to run")
    try:
        parity = msgspec.json.decode(package.read_file(path), type=_Parity)
        cases = [
            (
                {name: array.decode() for name, array in case.inputs.items()},
                {name: array.decode() for name, array in case.outputs.items()},
                case.tolerance,
            )
            for case in parity.cases
        ]
    except (msgspec.DecodeError, ValueError) as error:
        if isinstance(error, EvermindPackError):
            raise
        raise ManifestError(f"{path}: {error}") from error
    failures: list[str] = []
    programs: tuple[Steps, ...] = ("prefill", "decode")
    # One token's experts are enough to compute anything, however large the package.
    budget = token_cycle_bytes(package.manifest)
    model = Model(package, budget=budget, device="cpu", threads=None, verify="first")
    for number, (inputs, expected, tolerance) in enumerate(cases):
        for program in programs:
            found = model.forward(inputs, steps=program, outputs=list(expected))
            for name, array in expected.items():
                if off := _difference(array, found[name], tolerance):
                    failures.append(f"{path}: case {number}, {program}, {name}: {off}")
    return failures


def _difference(expected: Array, found: Array, tolerance: float) -> str | None:
    if expected.shape != found.shape:
        return f"expected shape {expected.shape}, found {found.shape}"
    if np.issubdtype(expected.dtype, np.integer):
        wrong = int(np.count_nonzero(expected != found))
        return f"{wrong} of {expected.size} integers differ" if wrong else None
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    error = float(np.abs(expected - found).max(initial=0.0)) / scale
    # Written so that a NaN fails.
    return (
        None if error <= tolerance else f"expected within {tolerance} of scale, found {error:.2g}"
    )
