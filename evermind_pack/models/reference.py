"""What a package of a model must compute: the model itself, run in float64.

Inputs and outputs go by the names a package's plan gives them, so that
`reference(model, inputs)` and the runtime's `forward(inputs)` can be compared key by key.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from evermind_manifests.errors import InputError
from torch import Tensor

from .base import Array, FamilyModel


def reference(model: FamilyModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Expected outputs, float32 (ids int64), as the model's `run` says.

    Raises `InputError` for names or shapes the model does not take.
    """
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    arrays = ordered(model.inputs, inputs)
    with torch.no_grad():
        return as_arrays(exact.run(*arrays))


def ordered(names: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
    """The inputs in the order of `names`. Raises `InputError` for other names."""
    if set(inputs) != set(names):
        raise InputError(f"inputs: expected {', '.join(names)}, found {', '.join(inputs)}")
    return [np.asarray(inputs[name]) for name in names]


def as_arrays(outputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """A model's outputs as a package has them: float32, ids int64."""
    return {
        name: value.numpy() if value.dtype == torch.int64 else value.float().numpy()
        for name, value in outputs.items()
    }
