"""Initial weights, byte-identical to the peer's: which values are drawn, in which order.

Source: specs/evermind-formats.md, sections 2.3, 2.4, 4.2, 7.3 and 8.2. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from evermind_exporters.checkpoints import Family, canonical_shapes
from evermind_runtime.lcg import Lcg

Tensor = npt.NDArray[np.float32]

# Used when the configuration has no seed; an explicit 0 is another stream (section 2.1).
DEFAULT_SEEDS: dict[Family, int] = {
    "shared-expert-moe": 0x4D6F4501,
    "evermind-lm": 0x45564C4D,
    "limbic": 0x11B1C5EE,
}

_LIMBIC_STD = {"win": 0.1, "ws": 0.1, "aLogit": 0.05, "woutState": 0.05, "woutReward": 0.05}


def initial_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a fresh model, float32 in canonical order.

    `config` is valid (`validate_config`); its `seed`, if any, decides the draws.
    """
    seed = config.get("seed")
    lcg = Lcg(DEFAULT_SEEDS[family] if seed is None else seed)
    shapes = canonical_shapes(family, config)
    if family == "limbic":
        return {
            name: _draw(lcg, shape, _LIMBIC_STD.get(name, 0.0)) for name, shape in shapes.items()
        }
    if family == "shared-expert-moe":
        return {name: _moe_tensor(lcg, name, shape) for name, shape in shapes.items()}
    # The LM's own seed draws the embedding only; each layer's experts have a generator.
    layers = [Lcg(lcg.state + 1 + layer) for layer in range(config["numLayers"])]
    tensors = {}
    for name, shape in shapes.items():
        if name == "token_embedding.weight":
            tensors[name] = _draw(lcg, shape, 0.02)
        elif ".moe." in name:
            layer = int(name.split(".")[1])
            tensors[name] = _moe_tensor(layers[layer], name, shape)
        elif name.endswith("conv.weight") and len(shape) == 2:
            tensors[name] = np.zeros(shape, dtype=np.float32)
            tensors[name][:, 0] = 1.0
        else:
            tensors[name] = np.ones(shape, dtype=np.float32)
    return tensors


def _moe_tensor(lcg: Lcg, name: str, shape: tuple[int, ...]) -> Tensor:
    kind = name.rpartition(".")[2]
    if kind == "w1":
        return _draw(lcg, shape, math.sqrt(2.0 / shape[1]))
    return _draw(lcg, shape, 0.02 if kind in ("weight", "w2") else 0.0)


def _draw(lcg: Lcg, shape: tuple[int, ...], std: float) -> Tensor:
    """N(0, std) in row-major order; a zero `std` (a bias) draws nothing."""
    if std == 0.0:
        return np.zeros(shape, dtype=np.float32)
    return lcg.gaussian(math.prod(shape), std).reshape(shape)
