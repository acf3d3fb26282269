"""`validate --run`: does the package compute what its parity file says, on this machine?"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
import numpy as np
from evermind_manifests.errors import (
    DeviceError,
    DigestError,
    EvermindPackError,
    InputError,
    IntegrityError,
    ManifestError,
    MissingExtraError,
    ShardError,
)
from evermind_manifests.manifest import MANIFEST_NAME, Half
from evermind_manifests.package import Package
from evermind_manifests.problems import Problem, problem, problem_of

from .budget import token_cycle_bytes
from .choose_compute import ComputeName, choose_compute
from .devices import numpy_dtype
from .model import Model, Steps
from .state import Array

# A package that is off by more computes something else.
_LOOSEST: Final = 1e-2
# How many parts of the rows have medians of their own, and of how many rows at least.
_PARTS, _PART_ROWS = 4, 8


class _Array(msgspec.Struct, frozen=True):
    dtype: Literal["f32", "i64"]
    shape: tuple[int, ...]
    data: str

    def decode(self) -> Array:
        if any(size < 0 for size in self.shape):  # numpy would fill one in
            raise ValueError(f"shape: expected sizes from 0 up, found {self.shape}")
        raw = base64.b64decode(self.data, validate=True)
        return np.frombuffer(raw, dtype=numpy_dtype(self.dtype)).reshape(self.shape)


class _Case(msgspec.Struct, frozen=True):
    inputs: dict[str, _Array]
    outputs: dict[str, _Array]
    tolerance: float


class _Parity(msgspec.Struct, frozen=True):
    cases: tuple[_Case, ...]


_PARITY = msgspec.json.Decoder(_Parity)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What parity cases gave: their problems, and the largest error among floats.

    `error` is relative to the output's largest magnitude, over both programs.
    """

    problems: list[Problem]
    error: float = 0.0


def parity_problems(
    package: Package, device: str = "cpu", compute: ComputeName = "auto"
) -> list[Problem]:
    """What `validate --run` reports: every result that is off, or why none could be had.

    Raises what `choose_compute` does.
    """
    chosen = choose_compute(compute, package.manifest, device)
    if chosen == "f32":
        return compare_parity(package, device).problems
    return compare_variant(package, chosen, device).problems


def compare_variant(package: Package, compute: Half, device: str = "cpu") -> Comparison:
    """`compare_parity` of the variant `compute`, which the package has."""
    tolerance = package.manifest.variants[compute].tolerance
    return compare_parity(package.computing(compute), device, tolerance)


def compare_parity(
    package: Package, device: str = "cpu", half_tolerance: float | None = None
) -> Comparison:
    """Run every parity case through both programs; what could not be run is a problem too.

    With `half_tolerance` the programs compute in half precision, and floats may be off by it as
    `typical_error` measures them. Raises `MissingExtraError`, `DeviceError` and `MemoryError`,
    which are the machine's fault.
    """
    path = package.manifest.parity
    if path is None:
        return Comparison(
            [
                problem(
                    "parity",
                    MANIFEST_NAME,
                    "there is no parity file: that the package computes anything cannot be shown",
                    "Export again with PyTorch installed, or validate without --run.",
                )
            ]
        )
    found: list[Problem] = []
    largest = 0.0
    try:
        for where, error, failure in _results(package, path, device, half_tolerance):
            largest = max(largest, error)
            if failure is not None:
                found.append(problem("parity", path, f"{where}: {failure}"))
    except (MissingExtraError, DeviceError, MemoryError):
        raise  # this machine's fault, not the package's
    except (IntegrityError, ShardError) as error:
        code = "digest-mismatch" if isinstance(error, DigestError) else "unreadable"
        found.append(problem_of(code, package.location, error))
    except EvermindPackError as error:
        found.append(problem_of("parity", path, error))
    except Exception as error:  # a graph may fail in ONNX Runtime in ways of its own
        found.append(problem("parity", path, f"{type(error).__name__}: {error}"))
    return Comparison(found, largest)


def typical_error(expected: Array, found: Array) -> float:
    """The largest error of a row, as the median over rows, relative to the largest magnitude.

    The median, as a near tie between two experts that rounding decides otherwise says nothing of
    a token's other numbers, and nothing of other tokens. What goes wrong from some position on (a
    window, a chunk of attention) must not be outvoted by the rows before it: half the median over
    the last 8 rows, or over one of up to four parts of at least 8, counts where it is more. Half,
    as of 8 rows a few near ties move the median itself.
    """
    if not np.isfinite(found).all():
        return float("inf")
    errors = np.abs(expected - found).reshape(len(expected), -1).max(axis=1)
    parts = np.array_split(errors, max(1, min(_PARTS, len(errors) // _PART_ROWS)))
    worst = max(float(np.median(part)) for part in (errors[-_PART_ROWS:], *parts))
    typical = max(float(np.median(errors)), worst / 2)
    return typical / (float(np.abs(expected).max(initial=0.0)) or 1.0)


def _results(
    package: Package, path: str, device: str, half_tolerance: float | None
) -> Iterator[tuple[str, float, str | None]]:
    """Of every output of every case: where it is, its error, and what is off, if anything."""
    cases = _read_cases(package.read_file(path), path)
    programs: tuple[Steps, ...] = ("prefill", "decode")
    # One token's experts are enough to compute anything, however large the package.
    budget = token_cycle_bytes(package.manifest)
    with ExitStack() as stack:
        model = Model(package, budget=budget, device=device, threads=None, verify="first")
        stack.callback(model.release)  # the package is the caller's
        # Other runtimes run the fused steps, whatever this one does with large experts.
        model._engine.decode = package.manifest.plan.decode
        for number, (inputs, outputs, tolerance) in enumerate(cases):
            for program in programs:
                where = f"case {number}, {program}"
                try:
                    found = model.forward(inputs, steps=program, outputs=list(outputs))
                except InputError as error:
                    yield where, 0.0, str(error)
                    continue
                for name, array in outputs.items():
                    if half_tolerance is None or array.ndim < 2:
                        off = _difference(array, found[name], half_tolerance or tolerance)
                    else:
                        off = _typical_difference(array, found[name], half_tolerance)
                    yield f"{where}, {name}", *off


def _read_cases(data: bytes, path: str) -> list[tuple[dict[str, Array], dict[str, Array], float]]:
    """(inputs, outputs, tolerance) of every case. Raises `ManifestError`."""
    try:
        parity = _PARITY.decode(data)
        _check_cases(parity.cases)
        return [
            (
                {name: array.decode() for name, array in case.inputs.items()},
                {name: array.decode() for name, array in case.outputs.items()},
                case.tolerance,
            )
            for case in parity.cases
        ]
    except (msgspec.DecodeError, ValueError) as error:
        raise ManifestError(f"{path}: {error}") from error


def _difference(expected: Array, found: Array, tolerance: float) -> tuple[float, str | None]:
    """The error of floats relative to the largest magnitude, and what is off, if anything."""
    if expected.shape != found.shape:
        return 0.0, f"expected shape {expected.shape}, found {found.shape}"
    if expected.dtype != found.dtype:
        return 0.0, f"expected {expected.dtype}, found {found.dtype}"
    if np.issubdtype(expected.dtype, np.integer):
        wrong = int(np.count_nonzero(expected != found))
        return 0.0, f"{wrong} of {expected.size} integers differ" if wrong else None
    # Where the model gives no number, the package must give none either.
    off = ~((expected == found) | (np.isnan(expected) & np.isnan(found)))
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)) or 1.0
    error = float(np.abs(expected[off] - found[off]).max(initial=0.0)) / scale
    # Written so that a NaN on one side only fails.
    if error <= tolerance:
        return error, None
    return error, f"expected within {tolerance} of scale, found {error:.2g}"


def _typical_difference(
    expected: Array, found: Array, tolerance: float
) -> tuple[float, str | None]:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return _difference(expected, found, tolerance)
    error = typical_error(expected, found)
    if error <= tolerance:
        return error, None
    return error, f"expected most tokens within {tolerance:.2g} of scale, found {error:.2g}"


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
