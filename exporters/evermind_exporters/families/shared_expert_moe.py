"""`shared-expert-moe`: one MoE layer, `x (T, d)` to `y (T, d)`."""

from __future__ import annotations

from collections.abc import Mapping

from evermind_manifests.manifest import (
    DType,
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Layer,
    Plan,
    Pooled,
    ValueSpec,
)
from evermind_runtime.lcg import Lcg

from ..blueprint import Blueprint
from ..family import Arrays, Config
from ..onnx_graph import ExternalTensor, GraphBuilder
from .evermind import EvermindFamily
from .kind import expert_kind, fused_experts
from .pooled import pool_bindings, pool_inputs, pooled_experts
from .relu_expert import KIND, TENSORS, expert, expert_layout, route, with_hidden


class SharedExpertMoe(EvermindFamily):
    """See the module."""

    name = "shared-expert-moe"

    def canonical_name(self, name: str) -> str:
        """The peer calls a lone layer's tensors `wr` and `expert{e}.w1`."""
        if name == "wr":
            return "router.weight"
        head, _, tail = name.partition(".")
        if head.startswith("expert") and head[6:].isdigit():
            return f"experts.{head[6:]}.{tail}"
        return name

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return [name for name in self.shapes(config) if not name.startswith("experts.")]

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """See `ModelFamily.expert_names`."""
        return {name: f"experts.{expert}.{name}" for name in TENSORS}

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        d_model = config["modelDim"]
        return {"x": Lcg(seed).gaussian(4 * d_model, 1.0).reshape(4, d_model)}

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        d_model, hidden = config["modelDim"], config["hiddenDim"]
        experts, top_k = config["numExperts"], config["topK"]

        b = GraphBuilder("router", resident)
        x = b.input("x", "f32", ["T", d_model])
        routed = route(b, x, "", top_k)
        b.output(routed.shared, "base", "f32", ["T", d_model])
        b.output(routed.ids, "ids", "i64", ["T", top_k])
        b.output(routed.gates, "gates", "f32", ["T", top_k])
        router = b.build()

        b = GraphBuilder("combine")
        base = b.input("base", "f32", ["T", d_model])
        routed_sum = b.input("e", "f32", ["T", d_model])
        b.output(b.op("Add", base, routed_sum), "y", "f32", ["T", d_model])
        combine = b.build()

        b = GraphBuilder("experts")
        base = b.input("base", "f32", [1, d_model])
        n = b.input("n", "f32", [1, d_model])
        gates = b.input("gates", "f32", [1, top_k])
        layout = expert_layout(d_model, hidden, dtype)
        y = fused_experts(b, n, gates, top_k, layout, expert, base)
        b.output(y, "y", "f32", [1, d_model])
        fused = b.build()

        b = GraphBuilder("layer", resident)
        x = b.input("x", "f32", ["T", d_model])
        routed = route(b, x, "", top_k)
        b.output(routed.ids, "ids", "i64", ["T", top_k])
        b.output(routed.gates, "gates", "f32", ["T", top_k])
        y = pooled_experts(
            b,
            x,
            routed.ids,
            routed.logits,
            pool_inputs(b, 0, experts, layout),
            experts=experts,
            top_k=top_k,
            activation="relu",
        )
        b.output(b.op("Add", routed.shared, y), "y", "f32", ["T", d_model])
        pooled = b.build()

        router_step = GraphStep(
            graph="graphs/router.onnx",
            inputs={"x": "x"},
            outputs={"base": "base", "ids": "ids.0", "gates": "gates.0"},
        )
        pooled_step = GraphStep(
            graph="graphs/pooled.onnx",
            inputs={"x": "x"},
            outputs={"y": "y", "ids": "ids.0", "gates": "gates.0"},
            pools=pool_bindings(0, layout),
        )
        plan = Plan(
            inputs={"x": ValueSpec(dtype="f32", shape=("T", d_model))},
            outputs={
                "y": ValueSpec(dtype="f32", shape=("T", d_model)),
                "ids.0": ValueSpec(dtype="i64", shape=("T", top_k)),
                "gates.0": ValueSpec(dtype="f32", shape=("T", top_k)),
            },
            state={},
            prefill=(
                router_step,
                ExpertsStep(layer=0, x="x", ids="ids.0", gates="gates.0", y="e.0"),
                GraphStep(
                    graph="graphs/combine.onnx",
                    inputs={"base": "base", "e": "e.0"},
                    outputs={"y": "y"},
                ),
            ),
            decode=(
                router_step,
                GraphStep(
                    graph="graphs/experts.onnx",
                    inputs={"base": "base", "n": "x", "gates": "gates.0"},
                    outputs={"y": "y"},
                    experts=FusedExperts(layer=0, ids="ids.0", gates="gates.0"),
                ),
            ),
            pooled=Pooled(prefill=(pooled_step,), decode=(pooled_step,)),
        )
        per_expert = 2 * d_model * hidden + hidden + d_model
        return Blueprint(
            kinds={KIND: expert_kind(layout, (d_model, d_model), expert, with_hidden=with_hidden)},
            layers=(Layer(layer=0, kind=KIND, experts=experts, top_k=top_k),),
            graphs={
                "graphs/router.onnx": router,
                "graphs/combine.onnx": combine,
                "graphs/experts.onnx": fused,
                "graphs/pooled.onnx": pooled,
            },
            plan=plan,
            active_parameters=experts * d_model + (1 + top_k) * per_expert,
        )


FAMILY = SharedExpertMoe()
