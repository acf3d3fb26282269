"""The Synapse family's configurations and parameters: names, shapes, counts, per module.

A package holds the whole model or one of its modules. Names are those of the published PyTorch
state dict. Source: specs/synapse.md, sections 1 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from evermind_manifests.errors import ConfigError

from ...config_fields import ConfigFields

Module: TypeAlias = Literal["model", "expert", "pool", "mamba", "thalamus", "xlstm", "fast_weights"]
Shape: TypeAlias = tuple[int, ...]

MODULES: Final[tuple[Module, ...]] = get_args(Module)
EXPERT_TENSORS: Final = ("w_gate", "w_up", "w_down")
# Labels of the seed's router; nothing trains experts towards them (section 2.3).
_EXPERT_NAMES: Final = (
    "language",
    "reasoning",
    "code",
    "math",
    "memory",
    "creative",
    "analysis",
    "planning",
)

_MAX_TENSORS = 1_000_000
# Key → default (None: needed, or computed from the others in `_computed`).
_DIMS: Final[dict[Module, dict[str, int | None]]] = {
    "model": {
        "d_model": 768,
        "vocab_size": 151936,
        "n_layers": 12,
        "n_experts": 8,
        "top_k": 2,
        "d_expert": 3072,
        "d_xlstm_hidden": 1536,
        "n_xlstm_heads": 4,
        "n_memory_heads": 8,
        "d_memory": 64,
        "d_state": 16,
    },
    "expert": {"d_model": 768, "d_expert": 3072},
    "pool": {"d_model": 768, "d_expert": 3072, "n_experts": 8, "top_k": 2},
    "mamba": {
        "d_model": 768,
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "d_inner": None,
        "dt_rank": None,
    },
    "thalamus": {"d_model": 768, "n_experts": 8, "top_k": 2, "d_state": 16},
    "xlstm": {"d_model": 768, "d_hidden": 1536, "n_heads": 4, "d_head": None},
    "fast_weights": {"d_model": 768, "n_heads": 8, "d_key": 64, "d_value": 64},
}
_NUMBERS: Final[dict[Module, dict[str, float]]] = {
    "model": {"hebbian_lr": 0.01, "hebbian_decay": 0.999, "decay": 0.95, "write_strength": 0.1},
    "thalamus": {"hebbian_lr": 0.01, "hebbian_decay": 0.999},
    "fast_weights": {"decay": 0.95, "write_strength": 0.1},
}
_FLAGS: Final[dict[Module, dict[str, bool]]] = {
    "model": {"hebbian_learning": True, "use_fast_weights": True}
}
# Tensors that a module has and none of those after it.
_MARKS: Final[dict[Module, frozenset[str]]] = {
    "model": frozenset({"embedding.weight", "lm_head.weight"}),
    "thalamus": frozenset({"router_proj.weight", "mamba.a_log"}),
    "mamba": frozenset({"a_log", "in_proj.weight"}),
    "xlstm": frozenset({"w_i.weight", "w_f.weight"}),
    "fast_weights": frozenset({"w_key.weight", "w_query.weight"}),
    "pool": frozenset({"experts.0.w_gate.weight"}),
    "expert": frozenset({"w_gate.weight", "w_up.weight", "w_down.weight"}),
}


def module_of(names: Collection[str]) -> Module | None:
    """The module whose state dict has these names; None if it is none's."""
    found = set(names)
    return next((module for module, marks in _MARKS.items() if marks <= found), None)


def expert_names(count: int) -> tuple[str, ...]:
    """The seed's labels for a router's experts."""
    return (*_EXPERT_NAMES[:count], *(f"expert_{index}" for index in range(8, count)))


def synapse_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of one module with defaults filled in; `raw["module"]` says which.

    Raises `ConfigError` for a module or field that is not known, a value out of range, or
    values that contradict one another.
    """
    fields = ConfigFields("synapse", raw)
    module = cast(Module, fields.choice("module", MODULES, "model"))
    result: dict[str, Any] = {"module": module}
    for key, default in _DIMS[module].items():
        result[key] = fields.integer(key, _computed(key, result) if default is None else default)
    for key, number in _NUMBERS.get(module, {}).items():
        result[key] = fields.number(key, number, low=0.0, high=1.0)
    for key, flag in _FLAGS.get(module, {}).items():
        result[key] = fields.flag(key, flag)
    result["seed"] = fields.integer("seed", 0, low=0, high=2**53)
    fields.finish()
    _check(module, result)
    return result


def synapse_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor's name and shape, for a configuration that is valid."""
    return _SHAPES[config["module"]](config)


def synapse_parameters(config: Mapping[str, Any]) -> tuple[int, int]:
    """(all parameters, those that one token uses), from the dimensions alone.

    A row of the embedding is looked up, but the whole matrix counts as active: so the seed's
    specification counts (section 3).
    """
    module = config["module"]
    expert = 3 * config["d_model"] * config.get("d_expert", 0)
    if module == "expert":
        return expert, expert
    if module == "pool":
        return config["n_experts"] * expert, config["top_k"] * expert
    if module != "model":
        total = _count(synapse_shapes(config))
        return total, total
    layers = config["n_layers"]
    outside = layers * _count(_layer_shapes(config)) + _count(_global_shapes(config))
    return outside + layers * config["n_experts"] * expert, outside + layers * config[
        "top_k"
    ] * expert


def mamba_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a thalamus's, or a model's, Mamba."""
    return synapse_config(
        {"module": "mamba", "d_model": config["d_model"], "d_state": config["d_state"]}
    )


def xlstm_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model's xLSTM layers."""
    return synapse_config(
        {
            "module": "xlstm",
            "d_model": config["d_model"],
            "d_hidden": config["d_xlstm_hidden"],
            "n_heads": config["n_xlstm_heads"],
        }
    )


def fast_weights_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model's memories."""
    return synapse_config(
        {
            "module": "fast_weights",
            "d_model": config["d_model"],
            "n_heads": config["n_memory_heads"],
            "d_key": config["d_memory"],
            "d_value": config["d_memory"],
            "decay": config["decay"],
            "write_strength": config["write_strength"],
        }
    )


def _computed(key: str, known: Mapping[str, Any]) -> int:
    if key == "d_inner":
        return int(known["expand"] * known["d_model"])
    if key == "dt_rank":
        return int(-(-known["d_model"] // 16))
    return int(known["d_hidden"] // known["n_heads"]) or 1  # d_head


def _check(module: Module, config: Mapping[str, Any]) -> None:
    problems = []
    if "top_k" in config and config["top_k"] > config["n_experts"]:
        problems.append(
            f"top_k: expected at most n_experts = {config['n_experts']}, found {config['top_k']}"
        )
    if module == "mamba" and config["d_conv"] < 2:
        problems.append(f"d_conv: expected 2 or more, found {config['d_conv']}")
    if module == "mamba" and config["d_inner"] != config["expand"] * config["d_model"]:
        problems.append(
            f"d_inner: expected expand * d_model = {config['expand'] * config['d_model']}, "
            f"found {config['d_inner']}"
        )
    if module == "xlstm" and config["d_head"] * config["n_heads"] != config["d_hidden"]:
        problems.append(
            f"d_hidden: expected n_heads * d_head = {config['n_heads'] * config['d_head']}, "
            f"found {config['d_hidden']}"
        )
    if module == "model" and config["d_xlstm_hidden"] % config["n_xlstm_heads"]:
        problems.append(
            f"d_xlstm_hidden: expected a multiple of n_xlstm_heads = {config['n_xlstm_heads']}, "
            f"found {config['d_xlstm_hidden']}"
        )
    tensors = config.get("n_layers", 1) * (40 + 3 * config.get("n_experts", 0))
    if tensors > _MAX_TENSORS:
        problems.append(f"expected at most {_MAX_TENSORS:,} tensors, found about {tensors:,}")
    if problems:
        raise ConfigError(f"synapse config: {problems[0]}")


def expert_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """One expert's tensors by their names in a shard: `w_down(silu(w_gate x) * w_up x)`."""
    width, hidden = config["d_model"], config["d_expert"]
    return {"w_gate": (hidden, width), "w_up": (hidden, width), "w_down": (width, hidden)}


def _expert(config: Mapping[str, Any]) -> dict[str, Shape]:
    return {f"{name}.weight": shape for name, shape in expert_shapes(config).items()}


def _pool(config: Mapping[str, Any]) -> dict[str, Shape]:
    one = _expert(config)
    return {
        f"experts.{index}.{name}": shape
        for index in range(config["n_experts"])
        for name, shape in one.items()
    }


def _mamba(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, inner, state, rank = (
        config[key] for key in ("d_model", "d_inner", "d_state", "dt_rank")
    )
    return {
        "in_proj.weight": (2 * inner, width),
        "conv1d.weight": (inner, 1, config["d_conv"]),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "a_log": (inner, state),
        "d": (inner,),
        "out_proj.weight": (width, inner),
    }


def _thalamus(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, experts = config["d_model"], config["n_experts"]
    return _under("mamba.", _mamba(mamba_of(config))) | {
        "router_proj.weight": (experts, width),
        "router_proj.bias": (experts,),
    }


def _xlstm(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, hidden = config["d_model"], config["d_hidden"]
    shapes: dict[str, Shape] = {}
    for gate in ("w_i", "w_f", "w_o"):
        shapes |= {f"{gate}.weight": (hidden, width), f"{gate}.bias": (hidden,)}
    shapes |= {f"{name}.weight": (hidden, width) for name in ("w_k", "w_v", "w_q")}
    return shapes | {"w_out.weight": (width, hidden)}


def _fast_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, heads = config["d_model"], config["n_heads"]
    keys, values = heads * config["d_key"], heads * config["d_value"]
    return {
        "w_key.weight": (keys, width),
        "w_value.weight": (values, width),
        "w_query.weight": (keys, width),
        "w_gate.weight": (heads, width),
        "w_out.weight": (width, values),
    }


def _layer_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """One layer's tensors without its experts."""
    width = config["d_model"]
    shapes = _under("xlstm.", _xlstm(xlstm_of(config)))
    shapes |= _under("thalamus.", _thalamus(config))
    if config["use_fast_weights"]:
        shapes |= _under("memory.", _fast_weights(fast_weights_of(config)))
    return shapes | {f"norm{number}.weight": (width,) for number in (1, 2, 3)}


def _global_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, vocabulary = config["d_model"], config["vocab_size"]
    return {
        "embedding.weight": (vocabulary, width),
        "final_norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }


def _model(config: Mapping[str, Any]) -> dict[str, Shape]:
    layer = _layer_shapes(config) | _under("experts.", _pool(config))
    shapes = _global_shapes(config)
    for number in range(config["n_layers"]):
        shapes |= _under(f"layers.{number}.", layer)
    return shapes


def _under(prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}


def _count(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


_SHAPES: Final = {
    "model": _model,
    "expert": _expert,
    "pool": _pool,
    "mamba": _mamba,
    "thalamus": _thalamus,
    "xlstm": _xlstm,
    "fast_weights": _fast_weights,
}
