"""The Atome language model out of a packed file or the reference's `.pt` checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evermind_manifests.errors import CheckpointError, MissingExtraError

from .blueprint import FloatArray
from .checkpoints.atome import read_atome
from .families.tilelli.params import NAME, resolve_lm
from .reason import reason

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
    # The file tells what its weights are. Levels of power-of-three are no trits: such a model
    # runs in plain numbers.
    trits = file.version != "ATOMEP3"
    used = {"quantize": trits, "weights": "ternary" if trits else "shadow"}
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
    except Exception as error:  # Damage shows as whatever PyTorch stumbles over.
        raise CheckpointError(f"{path}: not a checkpoint of tensors: {reason(error)}") from error
    found = content if isinstance(content, dict) else {}
    config, state = found.get("config"), found.get("state_dict")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary with `config` and `state_dict`, found "
            f"{', '.join(map(str, list(found)[:5])) or type(content).__name__}"
        )
    raw = {"module": "lm", **{str(key): value for key, value in config.items()}}
    family = raw.pop("family", NAME)
    if family != NAME:
        raise CheckpointError(f"{path}: config: family: expected {NAME!r}, found {family!r}")
    tensors: dict[str, FloatArray] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name}: expected a tensor of floats")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {name}: expected a dense tensor with its values, "
                f"found {tensor.layout} on {tensor.device.type!r}"
            )
        tensors[str(name)] = tensor.detach().float().numpy()
    return raw, tensors
