"""Weights of a fresh Synapse model or module.

As the published Python model's (specs/synapse.md, section 3), but for biases of the
convolution, which begin at 0, and the forget gates: their bias begins at -1 and their weights a
tenth as large. At the seed's 0 or 1 the memory of a fresh model grows until float32 cannot hold
it (section 4), and with large weights any token that repeats itself has the same effect: 48
spaces in a row were enough for gradients that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from evermind_exporters.families.synapse.params import Shape, synapse_shapes

Tensor = npt.NDArray[np.float32]

_FORGET_BIAS = -1.0
_FORGET_SCALE = 0.1
_EMBEDDING_STD = 0.02


def initial_weights(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor, float32, in the state dict's order; `config["seed"]` decides the draws."""
    rng = np.random.default_rng(config["seed"])
    shapes = synapse_shapes(config)
    return {name: _draw(rng, name, shape).astype(np.float32) for name, shape in shapes.items()}


def _draw(rng: np.random.Generator, name: str, shape: Shape) -> npt.NDArray[Any]:
    owner, _, kind = name.rpartition(".")
    if kind == "a_log":
        return np.tile(np.log(np.arange(1, shape[1] + 1)), (shape[0], 1))
    if kind == "d" or "norm" in owner:
        return np.ones(shape)
    if kind == "bias":
        return np.full(shape, _FORGET_BIAS if owner.endswith("w_f") else 0.0)
    if owner == "embedding":
        return rng.normal(0.0, _EMBEDDING_STD, shape)
    if len(shape) == 3:  # a convolution: PyTorch's default
        bound = 1 / math.sqrt(shape[2])
    else:  # Xavier
        bound = math.sqrt(6 / (shape[0] + shape[1]))
        if owner.endswith("w_f"):
            bound *= _FORGET_SCALE
    return rng.uniform(-bound, bound, shape)
