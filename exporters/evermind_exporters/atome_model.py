"""The Atome language model out of a packed file or the reference's `.pt` checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evermind_manifests.errors import CheckpointError, MissingExtraError

from .blueprint import FloatArray
from .checkpoints.atome import read_atome
from .families.tilelli.params import resolve_lm

# The largest file of any model worth packing: far above what these formats are used for.
_MAX_BYTES = 1 << 32


def atome_source(
    path: Path, raw: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, FloatArray]]:
    """(raw configuration, tensors) of the packed file `path`; `raw` is its config.json.

    The weights are used as they are: what was quantised once is not quantised again. Raises
    `ConfigError` or `CheckpointError`.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path}: larger than the {_MAX_BYTES:,} bytes it may have")
    rest = {key: value for key, value in raw.items() if key not in ("family", "module")}
    config = resolve_lm(rest)
    file = read_atome(path.read_bytes(), config, str(path))
    # Levels of power-of-three are no trits: such a model runs in plain numbers.
    used = {"quantize": False} if file.version == "ATOMEP3" else {"weights": "ternary"}
    return {**rest, "module": "lm", **used}, file.tensors()


def read_pickled(path: Path) -> tuple[dict[str, Any], dict[str, FloatArray]]:
    """(raw configuration, tensors) of a `.pt` file `{config, state_dict, …}`.

    Nothing but tensors and plain values is unpickled. Raises `CheckpointError` for any other
    content, `MissingExtraError` without PyTorch.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "train", "Reading a .pt checkpoint") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint of tensors: {reason}") from error
    found = content if isinstance(content, dict) else {}
    config, state = found.get("config"), found.get("state_dict")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary with `config` and `state_dict`, found "
            f"{', '.join(map(str, list(found)[:5])) or type(content).__name__}"
        )
    tensors: dict[str, FloatArray] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name}: expected a tensor of floats")
        tensors[str(name)] = tensor.float().numpy().astype(np.float32, copy=False)
    return {"module": "lm", **{str(key): value for key, value in config.items()}}, tensors
