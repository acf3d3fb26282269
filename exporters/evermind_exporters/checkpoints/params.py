"""The three Evermind families' configurations and parameters: names, shapes, canonical order.

The one place where these are listed; models, checkpoint readers and writers, and the
exporters all ask here. Source: specs/evermind-formats.md, sections 4.1, 4.2, 7.2, 7.3,
8.1 and 8.2. Configuration keys are the peer's (`modelDim`, `vocabSize`, `inputDim`, …).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from evermind_manifests.errors import ConfigError

Family: TypeAlias = Literal["shared-expert-moe", "evermind-lm", "limbic"]
Shape: TypeAlias = tuple[int, ...]

FAMILIES: tuple[Family, ...] = get_args(Family)

# Dimensions are stored as u32 (sections 6, 7.7, 10).
MAX_DIM = 2**32 - 1
# Far above any model here; a hostile config must not make us list billions of names.
MAX_TENSORS = 1_000_000
# The peer's limbic GPU kernel holds a hidden state in one workgroup (section 7.2).
MAX_LIMBIC_HIDDEN = 64

# Key → default (None: none, or computed), in the peer's order, which is the file headers' too.
_DIMS: dict[Family, dict[str, int | None]] = {
    "shared-expert-moe": {"modelDim": 64, "hiddenDim": 128, "numExperts": 8, "topK": 2},
    "evermind-lm": {
        "vocabSize": None,
        "dModel": 64,
        "numLayers": 2,
        "convKernel": 3,
        "hiddenDim": None,
        "numExperts": 4,
        "topK": 2,
    },
    "limbic": {"inputDim": 32, "hiddenDim": 16, "stateDim": 8},
}

# Tensors of every model of a family, and of no other family's.
MARKS: dict[Family, frozenset[str]] = {
    "shared-expert-moe": frozenset({"router.weight", "shared.w1"}),
    "evermind-lm": frozenset({"token_embedding.weight"}),
    "limbic": frozenset({"win", "aLogit"}),
}


def dim_names(family: Family) -> tuple[str, ...]:
    """The dimension keys of a family's configuration, in the order its checkpoint stores them."""
    return tuple(_DIMS[family])


def validate_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with defaults filled in: dimensions first, then all other keys as given.

    A seed and unknown keys are kept. Raises `ConfigError` for an unknown family, a missing
    `vocabSize`, a dimension that is not an integer from 1 to 2^32-1, `topK > numExperts`, a
    limbic `hiddenDim` above 64, or a `rewardWeight` or `seed` that is not a number.
    """
    if family not in _DIMS:
        raise ConfigError(f"family: expected one of {', '.join(FAMILIES)}, found {family!r}")
    result: dict[str, Any] = {}
    for key, default in _DIMS[family].items():
        if family == "evermind-lm" and key == "hiddenDim":
            default = 2 * result["dModel"]
        value = config.get(key, default)
        if type(value) is not int or not 1 <= value <= MAX_DIM:
            raise ConfigError(
                f"{family} config: {key}: expected an integer from 1 to {MAX_DIM}, found {value!r}"
            )
        result[key] = value
    if family == "limbic":
        _validate_limbic(result, config)
    elif result["topK"] > result["numExperts"]:
        raise ConfigError(
            f"{family} config: topK: expected at most numExperts = {result['numExperts']}, "
            f"found {result['topK']}"
        )
    seed = config.get("seed")
    if seed is not None and not _is_number(seed):
        raise ConfigError(f"{family} config: seed: expected a number, found {seed!r}")
    tensors = _tensor_count(family, result)
    if tensors > MAX_TENSORS:
        raise ConfigError(
            f"{family} config: expected at most {MAX_TENSORS:,} tensors, found {tensors:,}"
        )
    return result | {key: value for key, value in config.items() if key not in result}


def canonical_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor's name and shape in canonical order, for a configuration that is valid."""
    if family == "limbic":
        return _limbic_shapes(config)
    if family == "shared-expert-moe":
        return _moe_shapes(config["modelDim"], config["hiddenDim"], config["numExperts"])
    width = config["dModel"]
    shapes: dict[str, Shape] = {"token_embedding.weight": (config["vocabSize"], width)}
    moe = _moe_shapes(width, config["hiddenDim"], config["numExperts"])
    for layer in range(config["numLayers"]):
        prefix = f"layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _mixer_shapes(config).items()}
        shapes |= {f"{prefix}moe.{name}": shape for name, shape in moe.items()}
    return shapes


def parameter_count(family: Family, config: Mapping[str, Any]) -> int:
    """Scalars in all tensors together, from the dimensions alone: no name is listed.

    Safe for dimensions nobody checked yet (a file's header), however large.
    """
    if family == "limbic":
        return _numel(_limbic_shapes(config))
    if family == "shared-expert-moe":
        return _moe_numel(config["modelDim"], config["hiddenDim"], config["numExperts"])
    width = config["dModel"]
    layer = _numel(_mixer_shapes(config)) + _moe_numel(
        width, config["hiddenDim"], config["numExperts"]
    )
    return int(config["vocabSize"] * width + config["numLayers"] * layer)


def ffn_shapes(width: int, hidden: int) -> dict[str, Shape]:
    """One expert's tensors, `D = width`, `H = hidden`: `y = b2 + w2·relu(b1 + w1·x)`."""
    return {"w1": (hidden, width), "b1": (hidden,), "w2": (width, hidden), "b2": (width,)}


def _moe_shapes(width: int, hidden: int, experts: int) -> dict[str, Shape]:
    ffn = ffn_shapes(width, hidden)
    shapes: dict[str, Shape] = {"router.weight": (experts, width)}
    for owner in ("shared", *(f"experts.{index}" for index in range(experts))):
        shapes |= {f"{owner}.{name}": shape for name, shape in ffn.items()}
    return shapes


def _moe_numel(width: int, hidden: int, experts: int) -> int:
    return experts * width + (experts + 1) * _numel(ffn_shapes(width, hidden))


def _mixer_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    width = config["dModel"]
    return {
        "conv.weight": (width, config["convKernel"]),
        "norm_conv.weight": (width,),
        "norm_moe.weight": (width,),
    }


def _limbic_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    inputs, hidden, state = config["inputDim"], config["hiddenDim"], config["stateDim"]
    return {
        "win": (hidden, inputs),
        "ws": (hidden, state),
        "aLogit": (hidden,),
        "woutState": (state, hidden),
        "boutState": (state,),
        "woutReward": (hidden,),
        "boutReward": (1,),
    }


def _validate_limbic(result: dict[str, Any], config: Mapping[str, Any]) -> None:
    if result["hiddenDim"] > MAX_LIMBIC_HIDDEN:
        raise ConfigError(
            f"limbic config: hiddenDim: expected at most {MAX_LIMBIC_HIDDEN}, "
            f"found {result['hiddenDim']}"
        )
    weight = config.get("rewardWeight", 0.5)
    if not _is_number(weight) or not math.isfinite(weight):
        raise ConfigError(f"limbic config: rewardWeight: expected a number, found {weight!r}")
    result["rewardWeight"] = weight


def _tensor_count(family: Family, config: Mapping[str, Any]) -> int:
    if family == "limbic":
        return 7
    moe = 1 + 4 * (config["numExperts"] + 1)
    return moe if family == "shared-expert-moe" else int(1 + config["numLayers"] * (3 + moe))


def _numel(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
