"""`validate --run`: does the package compute what its parity file says, on this machine?"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Final, Literal

import msgspec
import numpy as np
from evermind_manifests.errors import EvermindPackError, IntegrityError, ManifestError
from evermind_manifests.manifest import MANIFEST_NAME
from evermind_manifests.package import Package
from evermind_manifests.problems import Problem, problem, problem_of

from .budget import token_cycle_bytes
from .devices import numpy_dtype
from .model import Model, Steps
from .state import Array

# A package that is off by more computes something else.
_LOOSEST: Final = 1e-2


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


def parity_problems(package: Package) -> list[Problem]:
    """What `validate --run` reports: every result that is off, or why none could be had."""
    path = package.manifest.parity
    if path is None:
        return [
            problem(
                "parity",
                MANIFEST_NAME,
                "there is no parity file: that the package computes anything cannot be shown",
                "Export again with PyTorch installed, or validate without --run.",
            )
        ]
    try:
        failures = parity_failures(package)
    except EvermindPackError as error:
        code = "digest-mismatch" if isinstance(error, IntegrityError) else "parity"
        return [problem_of(code, path, error)]
    return [problem("parity", path, failure) for failure in failures]


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
        _check_cases(parity.cases)
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
    # Where the model gives no number, the package must give none either.
    off = ~((expected == found) | (np.isnan(expected) & np.isnan(found)))
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)) or 1.0
    error = float(np.abs(expected[off] - found[off]).max(initial=0.0)) / scale
    # Written so that a NaN on one side only fails.
    return (
        None if error <= tolerance else f"expected within {tolerance} of scale, found {error:.2g}"
    )


def _check_cases(cases: Sequence[_Case]) -> None:
    if not cases:
        raise ValueError("cases: expected at least one, found none")
    for number, case in enumerate(cases):
        if not case.outputs:
            raise ValueError(f"case {number}: outputs: expected at least one, found none")
        if not 0 <= case.tolerance <= _LOOSEST:
            raise ValueError(
                f"case {number}: tolerance: expected 0 to {_LOOSEST}, found {case.tolerance}"
            )
