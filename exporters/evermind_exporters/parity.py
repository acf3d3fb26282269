"""parity.json: a few inputs with the outputs an independent implementation gives for them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import ExportError

from .blueprint import Tensors
from .family import Arrays, ModelFamily

# Given a configuration and the weights as stored, a function from inputs to outputs. The
# outputs may hold `margin`: the smallest gap that decided a route.
Reference: TypeAlias = Callable[[Mapping[str, Any], Tensors], Callable[[Arrays], Arrays]]

PARITY_NAME = "parity.json"
# A route decided by less than this may turn out otherwise in float32.
_MIN_MARGIN = 1e-5
_SEEDS = range(1, 17)


def parity_file(
    family: ModelFamily, config: Mapping[str, Any], tensors: Tensors, reference: Reference
) -> bytes:
    """The file's bytes for one case; the first seed whose routes are clear is taken.

    Raises `ExportError` if the model's own results are not finite: they would prove nothing.
    """
    run = reference(config, tensors)
    best: tuple[float, Arrays, Arrays] | None = None
    for seed in _SEEDS:
        inputs = family.sample_inputs(config, seed)
        outputs = run(inputs)
        margin = float(outputs.pop("margin", np.array(np.inf)))
        if best is None or margin > best[0]:
            best = (margin, inputs, outputs)
        if margin >= _MIN_MARGIN:
            break
    assert best is not None
    _, inputs, outputs = best
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise ExportError(
                f"{PARITY_NAME}: {name}: expected finite numbers from the model, found infinities "
                "or NaN",
                hint="Its weights are finite, but too large to compute with.",
            )
    return encode_case(inputs, outputs, family.parity_tolerance)


def encode_case(inputs: Arrays, outputs: Arrays, tolerance: float) -> bytes:
    """The bytes of a file with one case; `tolerance` is relative to an output's magnitude."""
    case = {
        "inputs": {name: _encode(array) for name, array in inputs.items()},
        "outputs": {name: _encode(array) for name, array in outputs.items()},
        "tolerance": tolerance,
    }
    return json.dumps({"cases": [case]}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _encode(array: npt.NDArray[Any]) -> dict[str, Any]:
    dtype = "i64" if np.issubdtype(array.dtype, np.integer) else "f32"
    stored = array.astype("<i8" if dtype == "i64" else "<f4")
    data = base64.b64encode(stored.tobytes()).decode()
    return {"dtype": dtype, "shape": list(array.shape), "data": data}
