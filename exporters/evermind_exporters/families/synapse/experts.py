"""The Synapse expert `w_down(silu(w_gate x) * w_up x)`, and the modules `expert` and `pool`.

Formulas: specs/synapse.md, sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from evermind_manifests.manifest import (
    DType,
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Layer,
    Plan,
    ValueSpec,
)
from evermind_manifests.shard import ShardLayout, plan_shard
from evermind_runtime.lcg import Lcg

from ...blueprint import Blueprint, KindBlueprint
from ...family import Arrays, Config
from ...onnx_graph import ExternalTensor, GraphBuilder
from ..kind import expert_kind, fused_experts
from ..linear import Weight, linear
from .module import SynapseModule
from .params import EXPERT_TENSORS, expert_shapes, synapse_parameters

KIND = "swiglu"
_ROWS = 12


def expert_layout(config: Config, dtype: DType) -> ShardLayout:
    """An expert's shard, its matrices stored as `dtype`."""
    shapes = expert_shapes(config)
    return plan_shard(KIND, "silu", [(name, dtype, shape) for name, shape in shapes.items()])


def swiglu_kind(config: Config, dtype: DType) -> KindBlueprint:
    """The kind of all Synapse experts, with statistics."""
    width = config["d_model"]
    return expert_kind(
        expert_layout(config, dtype), (width, width), swiglu, with_hidden=_with_hidden
    )


def swiglu(b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
    """One expert on `x` `(rows, d)`."""
    return _with_hidden(b, x, weights)[0]


def _with_hidden(b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> tuple[str, str]:
    gate, up = linear(b, x, weights["w_gate"]), linear(b, x, weights["w_up"])
    hidden = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    return linear(b, hidden, weights["w_down"]), hidden


class ExpertModule(SynapseModule):
    """One expert on its own: a layer of one, to which every token is routed."""

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return []

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """See `ModelFamily.expert_names`."""
        return {name: f"{name}.weight" for name in EXPERT_TENSORS}

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        return {"x": sample_rows(Lcg(seed), config)}

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        width = config["d_model"]
        b = GraphBuilder("route")
        rows = b.op("Shape", b.input("x", "f32", ["T", width]), end=1)
        one = b.op("Concat", rows, b.const([1]), axis=0)
        b.output(b.op("Expand", b.const([[0]]), one), "ids", "i64", ["T", 1])
        b.output(b.op("Expand", b.const([[1.0]], np.float32), one), "gates", "f32", ["T", 1])
        route = b.build()

        b = GraphBuilder("fused")
        x, gates = b.input("x", "f32", [1, width]), b.input("gates", "f32", [1, 1])
        y = fused_experts(b, x, gates, 1, expert_layout(config, dtype), swiglu)
        b.output(y, "y", "f32", [1, width])

        routed = GraphStep(
            graph="graphs/route.onnx",
            inputs={"x": "x"},
            outputs={"ids": "ids.0", "gates": "gates.0"},
        )
        fused = GraphStep(
            graph="graphs/fused.onnx",
            inputs={"x": "x", "gates": "gates.0"},
            outputs={"y": "y"},
            experts=FusedExperts(layer=0, ids="ids.0", gates="gates.0"),
        )
        return Blueprint(
            kinds={KIND: swiglu_kind(config, dtype)},
            layers=(Layer(layer=0, kind=KIND, experts=1, top_k=1),),
            graphs={"graphs/route.onnx": route, "graphs/fused.onnx": b.build()},
            plan=Plan(
                inputs={"x": ValueSpec(dtype="f32", shape=("T", width))},
                outputs={"y": ValueSpec(dtype="f32", shape=("T", width))},
                state={},
                prefill=(routed, _experts_step("ids.0", "gates.0")),
                decode=(routed, fused),
            ),
            active_parameters=synapse_parameters(config)[1],
        )


class PoolModule(SynapseModule):
    """A pool that is told its routes. Both programs are the same steps: which of a token's
    experts there are is known only when its routes are."""

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return []

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """See `ModelFamily.expert_names`."""
        return {name: f"experts.{expert}.{name}.weight" for name in EXPERT_TENSORS}

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`; some indices are repeated, some no expert's."""
        lcg, top_k = Lcg(seed), config["top_k"]
        uniforms = lcg.uniforms(2 * _ROWS * top_k).reshape(2, _ROWS, top_k)
        return {
            "x": sample_rows(lcg, config),
            "expert_indices": (uniforms[0] * (config["n_experts"] + 1)).astype(np.int64),
            "routing_weights": uniforms[1].astype(np.float32),
        }

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        width, top_k = config["d_model"], config["top_k"]
        routed = GraphStep(
            graph="graphs/routes.onnx",
            inputs={"indices": "expert_indices", "weights": "routing_weights"},
            outputs={"ids": "ids.0", "gates": "gates.0"},
        )
        steps = (routed, _experts_step("ids.0", "gates.0", skips=True))
        return Blueprint(
            kinds={KIND: swiglu_kind(config, dtype)},
            layers=(Layer(layer=0, kind=KIND, experts=config["n_experts"], top_k=top_k),),
            graphs={"graphs/routes.onnx": _routes(config["n_experts"], top_k)},
            plan=Plan(
                inputs={
                    "x": ValueSpec(dtype="f32", shape=("T", width)),
                    "expert_indices": ValueSpec(dtype="i64", shape=("T", top_k)),
                    "routing_weights": ValueSpec(dtype="f32", shape=("T", top_k)),
                },
                outputs={"y": ValueSpec(dtype="f32", shape=("T", width))},
                state={},
                prefill=steps,
                decode=steps,
            ),
            active_parameters=synapse_parameters(config)[1],
        )


def sample_rows(lcg: Lcg, config: Config) -> np.ndarray:
    """Normal `x` `(12, d_model)`."""
    width = config["d_model"]
    return lcg.gaussian(_ROWS * width, 1.0).reshape(_ROWS, width)


def _experts_step(ids: str, gates: str, *, skips: bool = False) -> ExpertsStep:
    return ExpertsStep(layer=0, x="x", ids=ids, gates=gates, y="y", skips=skips)


def _routes(experts: int, top_k: int) -> bytes:
    """Each expert once per token, with the sum of its weights; -1 for what is no expert."""
    b = GraphBuilder("routes")
    ids = b.input("indices", "i64", ["T", top_k])
    weights = b.input("weights", "f32", ["T", top_k])
    same = b.op("Equal", b.op("Unsqueeze", ids, b.const([2])), b.op("Unsqueeze", ids, b.const([1])))
    same = b.cast(same, "f32")
    gates = b.op("MatMul", same, b.op("Unsqueeze", weights, b.const([2])))
    before = b.const(np.tril(np.ones((top_k, top_k)), -1), np.float32)
    earlier = b.op("ReduceSum", b.op("Mul", same, before), b.const([2]), keepdims=0)
    first = b.op("Less", earlier, b.const(0.5, np.float32))
    known = b.op(
        "And", b.op("GreaterOrEqual", ids, b.const(0)), b.op("Less", ids, b.const(experts))
    )
    kept = b.op("Where", b.op("And", known, first), ids, b.const(-1))
    b.output(kept, "ids", "i64", ["T", top_k])
    b.output(b.op("Squeeze", gates, b.const([2])), "gates", "f32", ["T", top_k])
    return b.build()
