"""What a package of a model must compute: the model itself, run in float64.

Inputs and outputs go by the names a package's plan gives them, so that
`reference(model, inputs)` and the runtime's `forward(inputs)` can be compared key by key.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from evermind_exporters.checkpoints import Family
from evermind_manifests.errors import InputError
from torch import Tensor

from .base import FamilyModel
from .evermind_lm import EvermindLM
from .limbic import LimbicModel, LimbicOutput
from .moe_layer import MoeOutput
from .shared_expert_moe import SharedExpertMoE

Array = npt.NDArray[Any]


def reference(model: FamilyModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Expected outputs, float32 (ids int64).

    - language model: `tokens` (T,) int64 → `logits` (T, V), and `ids.{l}`, `gates.{l}` (T, K)
    - MoE layer: `x` (T, D) → `y` (T, D), `ids.0`, `gates.0` (T, K)
    - limbic: `x` (N, I), `hidden` (N, H), `state` (N, S) → `hidden`, `delta`, `reward` (N,)

    Raises `InputError` for names or shapes the model does not take, or a token outside the
    vocabulary.
    """
    names, run = _RUNS[model.family]
    if set(inputs) != set(names):
        raise InputError(f"inputs: expected {', '.join(names)}, found {', '.join(inputs)}")
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    with torch.no_grad():
        outputs = run(exact, *(np.asarray(inputs[name]) for name in names))
    return {
        name: value.numpy() if value.dtype == torch.int64 else value.float().numpy()
        for name, value in outputs.items()
    }


def _run_moe(model: SharedExpertMoE, x: Array) -> dict[str, Tensor]:
    out: MoeOutput = model(_rows("x", x, model.config["modelDim"]))
    return {"y": out.y, "ids.0": out.experts, "gates.0": out.gates}


def _run_lm(model: EvermindLM, tokens: Array) -> dict[str, Tensor]:
    vocabulary = model.config["vocabSize"]
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"tokens: expected (T,) integers, found {tokens.dtype} {tokens.shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise InputError(f"tokens: expected ids from 0 to {vocabulary - 1}")
    logits, routes = model(torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0))
    outputs = {"logits": logits[0]}
    for layer, taken in enumerate(routes):
        outputs |= {f"ids.{layer}": taken.experts[0], f"gates.{layer}": taken.gates[0]}
    return outputs


def _run_limbic(model: LimbicModel, x: Array, hidden: Array, state: Array) -> dict[str, Tensor]:
    config = model.config
    out: LimbicOutput = model(
        _rows("x", x, config["inputDim"]),
        _rows("hidden", hidden, config["hiddenDim"]),
        _rows("state", state, config["stateDim"]),
    )
    return {"hidden": out.hidden, "delta": out.delta, "reward": out.reward}


def _rows(name: str, array: Array, width: int) -> Tensor:
    if array.ndim != 2 or array.shape[1] != width:
        raise InputError(f"{name}: expected shape (N, {width}), found {array.shape}")
    # Rounded to float32 first: that is what a package is given.
    return torch.from_numpy(array.astype(np.float32).astype(np.float64))


_RUNS: dict[Family, tuple[tuple[str, ...], Callable[..., dict[str, Tensor]]]] = {
    "shared-expert-moe": (("x",), _run_moe),
    "evermind-lm": (("tokens",), _run_lm),
    "limbic": (("x", "hidden", "state"), _run_limbic),
}
