"""`tokitai-moe`: one MoE layer of deep MLPs, `x (T, in)` to `logits (T, out)`; no state.

    p = softmax(W x + b);  w = p at the row's top k, else 0;  y = sum_e w_e * Expert_e(x)
    Expert: n + 1 times [Linear, LayerNorm, GELU], then a Linear

Formulas and counts: specs/tokitai.md, sections 1 to 3. What that text marks as assumed (nobody
published it) is a field of the configuration, and `assumed` lists those fields. Matrices are
stored as the export's dtype; biases and norms, whose bytes do not count, stay float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from evermind_manifests.errors import ConfigError
from evermind_manifests.manifest import (
    DType,
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Layer,
    Plan,
    Router,
    ValueSpec,
)
from evermind_manifests.shard import ShardLayout, plan_shard
from evermind_runtime.lcg import Lcg

from ..blueprint import Blueprint, FloatArray, Tensors
from ..config_fields import ConfigFields
from ..family import Arrays, Config, ModelFamily, ModularFamily, Shape, Shapes
from ..lazy_tensors import LazyTensors
from ..onnx_graph import ExternalTensor, GraphBuilder
from .kind import expert_kind, fused_experts
from .linear import Weight, linear

NAME: Final = "tokitai-moe"
KIND: Final = "layernorm-mlp"

# size → (hidden, depth); section 1.
SIZES: Final = {"nano": (128, 2), "tiny": (2048, 5), "medium": (4096, 5), "full": (4096, 12)}
_USUAL: Final = {"in_dim": 96, "out_dim": 20, "n_experts": 4, "top_k": 2}
# Of each row's routing, for introspection (section 4).
_STATISTICS: Final = ("kept_mass", "top_weight", "entropy")
_ASSUMED: Final = ("gelu", "layer_norm_eps", "layer_norm_variance", "ties")
_RECORDED: Final = frozenset({"router_kind", "fingerprint"})
_MAX_TENSORS: Final = 1_000_000
_LINEAR: Final = re.compile(r"experts\.0\.linears\.(\d+)\.weight")


class TokitaiMoe(ModelFamily):
    """See the module.

    `config`: `size` (`nano`, `tiny`, `medium`, `full`, or `free` for other dims), `in_dim`,
    `out_dim`, `hidden`, `depth`, `n_experts`, `top_k`, `renormalize`, `gelu` (`erf` or
    `tanh`), `layer_norm_eps`, optional `seed`, and what arch.json says of itself:
    `router_kind`, `fingerprint`.
    """

    name = "moe"
    presets: Mapping[str, Config] = {size: {"size": size} for size in SIZES}

    def resolve(self, raw: Config, found: Shapes) -> dict[str, Any]:
        """See `ModelFamily.resolve`.

        Dims that are left out are those of `size`, else of the tensors. Counts that other
        tools write beside them (`total_params`, …) must be right; they are not recorded.
        """
        fields = ConfigFields(NAME, raw)
        size = fields.choice("size", [*SIZES, "free"], "free", fold=True)
        told = dims_of(found) if size == "free" else _preset_dims(size)
        config: dict[str, Any] = {}
        for key in ("in_dim", "out_dim", "hidden", "depth", "n_experts", "top_k"):
            config[key] = fields.integer(key, told.get(key), low=0 if key == "depth" else 1)
            if size != "free" and config[key] != told[key]:
                fields.refuse(key, f"{told[key]} for size {size}", config[key])
        if config["top_k"] > config["n_experts"]:
            fields.refuse("top_k", f"at most n_experts = {config['n_experts']}", config["top_k"])
        tensors = config["n_experts"] * _expert_tensors(config) + 2
        if tensors > _MAX_TENSORS:
            raise ConfigError(
                f"{NAME} config: expected at most {_MAX_TENSORS:,} tensors, found {tensors:,}"
            )
        resolved = {
            "size": _size_of(config),
            **config,
            "renormalize": fields.flag("renormalize", False),
            "gelu": fields.choice("gelu", ("erf", "tanh"), "erf"),
            "layer_norm_eps": fields.number("layer_norm_eps", 1e-5, low=1e-12, high=1.0),
            "layer_norm_variance": fields.fixed("layer_norm_variance", "biased"),
            "ties": fields.fixed("ties", "lower index"),
            "assumed": fields.fixed("assumed", list(_ASSUMED)),
        }
        if "seed" in raw:
            resolved["seed"] = fields.integer("seed", low=0, high=2**64 - 1)
        for key in sorted(_RECORDED & raw.keys()):
            resolved[key] = fields.text(key)
        for key, count in _counts(config).items():
            fields.fixed(key, count)
        fields.finish()
        return resolved

    def recognises(self, found: Shapes) -> bool:
        """See `ModelFamily.recognises`."""
        return {"router.bias", "experts.0.linears.0.weight", "experts.0.norms.0.weight"} <= set(
            found
        )

    def shapes(self, config: Config) -> dict[str, Shape]:
        """See `ModelFamily.shapes`."""
        experts = range(config["n_experts"])
        one = expert_shapes(config)
        return {
            "router.weight": (config["n_experts"], config["in_dim"]),
            "router.bias": (config["n_experts"],),
            **{f"experts.{e}.{name}": shape for e in experts for name, shape in one.items()},
        }

    def initial(self, config: Config) -> Tensors:
        """See `ModelFamily.initial`.

        Matrices are normal with standard deviation sqrt(2 / fan-in), biases 0, LayerNorms 1
        and 0 (section 3). The seed's high 32 bits are the experts', its low 32 the router's:
        seeds below 2^32 differ in the router alone. Linear i of expert e is drawn by numpy's
        `Generator(PCG64(SeedSequence(high, spawn_key=(e, i))))`, the router by
        `SeedSequence(low)`, with `standard_normal` in float32, row by row.
        """
        high, low = divmod(config.get("seed", 0), 2**32)

        def draw(name: str, shape: Shape) -> FloatArray:
            if len(shape) == 1:
                fill = np.ones if ".norms." in name and name.endswith(".weight") else np.zeros
                return fill(shape, dtype=np.float32)
            parts = name.split(".")
            if parts[0] == "router":
                seed = np.random.SeedSequence(low)
            else:
                seed = np.random.SeedSequence(high, spawn_key=(int(parts[1]), int(parts[3])))
            generator = np.random.Generator(np.random.PCG64(seed))
            array = generator.standard_normal(shape, dtype=np.float32)
            array *= np.float32(math.sqrt(2 / shape[1]))
            return array

        return LazyTensors(self.shapes(config), draw)

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return ["router.weight", "router.bias"]

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """See `ModelFamily.expert_names`."""
        return {name: f"experts.{expert}.{name}" for name in expert_shapes(config)}

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        width = config["in_dim"]
        return {"x": Lcg(seed).gaussian(4 * width, 1.0).reshape(4, width)}

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        width, out, top_k = config["in_dim"], config["out_dim"], config["top_k"]
        layout, expert = _layout(config, dtype), _Expert(config)

        b = GraphBuilder("experts")
        x = b.input("x", "f32", [1, width])
        gates = b.input("gates", "f32", [1, top_k])
        y = fused_experts(b, x, gates, top_k, layout, expert)
        b.output(y, "y", "f32", [1, out])
        graphs = {"graphs/router.onnx": _router(config, resident), "graphs/experts.onnx": b.build()}

        values = {name: f"{name}.0" for name in ("ids", "gates", "probabilities", *_STATISTICS)}
        router = GraphStep(
            graph="graphs/router.onnx",
            inputs={"x": "x"},
            outputs={**values, "router_weights": "router_weights"},
        )
        experts = Layer(layer=0, kind=KIND, experts=config["n_experts"], top_k=top_k)
        scores = ValueSpec(dtype="f32", shape=("T", config["n_experts"]))
        logits = ValueSpec(dtype="f32", shape=("T", out))
        plan = Plan(
            inputs={"x": ValueSpec(dtype="f32", shape=("T", width), aliases=("features",))},
            outputs={
                "logits": ValueSpec(dtype="f32", shape=("T", out), value="y"),
                "y": logits,
                "router_weights": scores,
                "ids.0": ValueSpec(dtype="i64", shape=("T", top_k)),
                "gates.0": ValueSpec(dtype="f32", shape=("T", top_k)),
            },
            state={},
            prefill=(router, ExpertsStep(layer=0, x="x", ids="ids.0", gates="gates.0", y="y")),
            decode=(
                router,
                GraphStep(
                    graph="graphs/experts.onnx",
                    inputs={"x": "x", "gates": "gates.0"},
                    outputs={"y": "y"},
                    experts=FusedExperts(layer=0, ids="ids.0", gates="gates.0"),
                ),
            ),
            observations={
                "probabilities.0": scores,
                **{f"{name}.0": ValueSpec(dtype="f32", shape=("T",)) for name in _STATISTICS},
            },
            routers=(
                Router(layer=0, ids="ids.0", gates="gates.0", probabilities="probabilities.0"),
            ),
        )
        return Blueprint(
            kinds={KIND: expert_kind(layout, (width, out), expert, with_hidden=expert.with_hidden)},
            layers=(experts,),
            graphs=graphs,
            plan=plan,
            active_parameters=router_count(config) + top_k * expert_count(config),
        )

    def parameter_count(self, config: Config) -> int:
        """See `ModelFamily.parameter_count`."""
        return router_count(config) + int(config["n_experts"]) * expert_count(config)


def expert_shapes(config: Config) -> dict[str, Shape]:
    """One expert's tensors in the order they are used: stage by stage, linear before norm."""
    hidden, stages = config["hidden"], config["depth"] + 1
    shapes: dict[str, Shape] = {}
    for stage in range(stages + 1):
        out = hidden if stage < stages else config["out_dim"]
        width = hidden if stage else config["in_dim"]
        shapes |= {f"linears.{stage}.weight": (out, width), f"linears.{stage}.bias": (out,)}
        if stage < stages:
            shapes |= {f"norms.{stage}.weight": (out,), f"norms.{stage}.bias": (out,)}
    return shapes


def expert_count(config: Config) -> int:
    """Scalars of one expert; section 2."""
    return sum(math.prod(shape) for shape in expert_shapes(config).values())


def router_count(config: Config) -> int:
    """Scalars of the router."""
    return int(config["n_experts"] * (config["in_dim"] + 1))


def dims_of(found: Shapes) -> dict[str, int]:
    """The dims that a state dict's tensors tell; the usual ones where they tell nothing."""
    stages = [int(match[1]) for name in found if (match := _LINEAR.fullmatch(name))]
    names = ["experts.0.linears.0.weight", "router.weight"]
    if stages:
        names.append(f"experts.0.linears.{max(stages)}.weight")
    if len(names) < 3 or any(len(found.get(name, ())) != 2 for name in names):
        return dict(_USUAL)
    first, router, last = (found[name] for name in names)
    return _USUAL | {
        "in_dim": first[1],
        "hidden": first[0],
        "out_dim": last[0],
        "depth": max(stages) - 1,
        "n_experts": router[0],
    }


class _Expert:
    """One expert's arithmetic, for `kind.py`."""

    def __init__(self, config: Config) -> None:
        self._stages = config["depth"] + 1
        self._epsilon = config["layer_norm_eps"]
        self._approximate = "none" if config["gelu"] == "erf" else "tanh"

    def __call__(self, b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
        return self.with_hidden(b, x, weights)[0]

    def with_hidden(
        self, b: GraphBuilder, x: str, weights: Mapping[str, Weight]
    ) -> tuple[str, str]:
        """The result, and the last stage's activations."""
        for stage in range(self._stages):
            x = linear(b, x, weights[f"linears.{stage}.weight"], weights[f"linears.{stage}.bias"])
            gain, shift = (weights[f"norms.{stage}.{name}"].value for name in ("weight", "bias"))
            x = b.op("LayerNormalization", x, gain, shift, axis=-1, epsilon=self._epsilon)
            x = b.op("Gelu", x, approximate=self._approximate)
        last = f"linears.{self._stages}"
        return linear(b, x, weights[f"{last}.weight"], weights[f"{last}.bias"]), x


def _router(config: Config, resident: Mapping[str, ExternalTensor]) -> bytes:
    """`x` → the k best `ids` and their `gates`, all `probabilities`, and these masked."""
    top_k, experts = config["top_k"], config["n_experts"]
    b = GraphBuilder("router", resident)
    x = b.input("x", "f32", ["T", config["in_dim"]])
    scores = b.op("Gemm", x, b.weight("router.weight"), b.weight("router.bias"), transB=1)
    p = b.op("Softmax", scores, axis=-1)
    # Equal probabilities come lower index first.
    gates, ids = b.op("TopK", p, b.const([top_k]), outputs=2, axis=-1, largest=1, sorted=1)
    if config["renormalize"]:
        gates = b.op("Div", gates, b.op("ReduceSum", gates, b.const([-1]), keepdims=1))
    zeros = b.op("Mul", p, b.const(0, np.float32))
    masked = b.op("ScatterElements", zeros, ids, gates, axis=1)
    b.output(ids, "ids", "i64", ["T", top_k])
    b.output(gates, "gates", "f32", ["T", top_k])
    b.output(p, "probabilities", "f32", ["T", experts])
    b.output(masked, "router_weights", "f32", ["T", experts])
    statistics = {
        "kept_mass": b.op("ReduceSum", gates, b.const([-1]), keepdims=0),
        "top_weight": b.op("ReduceMax", gates, b.const([-1]), keepdims=0),
        "entropy": _entropy(b, p),
    }
    for name in _STATISTICS:
        b.output(statistics[name], name, "f32", ["T"])
    return b.build()


def _entropy(b: GraphBuilder, p: str) -> str:
    """`-sum p log p` of each row, in nats; a probability of 0 adds 0."""
    logarithm = b.op("Log", b.op("Max", p, b.const(np.finfo(np.float32).tiny, np.float32)))
    total = b.op("ReduceSum", b.op("Mul", p, logarithm), b.const([-1]), keepdims=0)
    return str(b.op("Neg", total))


def _layout(config: Config, dtype: DType) -> ShardLayout:
    tensors: list[tuple[str, DType, Shape]] = [
        (name, dtype if len(shape) == 2 else "f32", shape)
        for name, shape in expert_shapes(config).items()
    ]
    return plan_shard(KIND, f"gelu-{config['gelu']}", tensors)


def _expert_tensors(config: Config) -> int:
    return int(4 * config["depth"] + 6)


def _preset_dims(size: str) -> dict[str, int]:
    hidden, depth = SIZES[size]
    return _USUAL | {"hidden": hidden, "depth": depth}


def _size_of(config: Config) -> str:
    return next((size for size in SIZES if _preset_dims(size) == config), "free")


def _counts(config: Config) -> dict[str, int]:
    """What the dims amount to, by the names other tools give it; section 2."""
    router, expert = router_count(config), expert_count(config)
    return {
        "router_params": router,
        "expert_params": expert,
        "total_params": router + config["n_experts"] * expert,
        "expert_tensors": _expert_tensors(config),
        "model_tensors": config["n_experts"] * _expert_tensors(config) + 2,
    }


FAMILY = ModularFamily(NAME, {"moe": TokitaiMoe()})
