"""Initial weights of Tilelli models (specs/tilelli.md, section 2). numpy only.

Matrices are normal with deviation 1/sqrt(fan in), convolutions 1/sqrt(k), `b` and `c_out`
1/sqrt(d); `a_raw` is 1.5, so that a state keeps 0.905 of itself. The reference's draws are
PyTorch's and not reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from evermind_exporters.family import Shape

_DECAY = 1.5


def initial_weights(shapes: Mapping[str, Shape], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor of a fresh model; equal seeds give equal weights."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        kind = name.rpartition(".")[2]
        if "norm." in name:
            values = np.full(shape, 1.0 if kind == "weight" else 0.0)
        elif kind == "a_raw":
            values = np.full(shape, _DECAY)
        else:
            values = generator.normal(size=shape) / math.sqrt(shape[-1])
        tensors[name] = values.astype(np.float32)
    return tensors
