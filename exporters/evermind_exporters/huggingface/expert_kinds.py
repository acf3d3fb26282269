"""The kinds of experts of a model: layers whose experts compute alike share one.

An expert that is a SwiGLU has the graph of our own (`families/synapse/experts.py`). Of any other
`expert_trace.py` traces one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from evermind_manifests.manifest import DType, Half
from evermind_manifests.shard import ShardLayout, plan_shard

from ..blueprint import KindBlueprint
from ..families.kind import Expert, expert_inputs, expert_kind, fused_experts
from ..families.linear import Weight
from ..families.synapse.experts import KIND, swiglu
from ..onnx_graph import GraphBuilder
from .expert_trace import trace_expert
from .experts import ExpertsModule
from .half import fit_model


class ExpertKinds:
    """The kinds by name, and for each layer the name of its own in `of`."""

    def __init__(
        self, model: Any, modules: Sequence[ExpertsModule], stored_as: Sequence[dict[str, DType]]
    ) -> None:
        """`model` may lie on the meta device. Raises `UnsupportedError` for untraceable ones."""
        self.blueprints: dict[str, KindBlueprint] = {}
        self.of: list[str] = []
        self._arithmetic: dict[str, tuple[Expert, int]] = {}
        traced: dict[Hashable, Expert] = {}
        for module, types in zip(modules, stored_as, strict=True):
            expert: Expert = swiglu
            if not module.swiglu:
                key = _behaviour(model.get_submodule(module.path), module)
                if key not in traced:
                    traced[key] = trace_expert(model, module)
                expert = traced[key]
            self.of.append(self._name(module, types, expert))

    def fused(self, kind: str, top_k: int) -> bytes:
        """The graph of `top_k` experts, unrolled, for one token."""
        expert, width = self._arithmetic[kind]
        return _fused(GraphBuilder("fused"), self.blueprints[kind].layout, expert, width, top_k)

    def _name(self, module: ExpertsModule, types: dict[str, DType], expert: Expert) -> str:
        number = 1
        while True:
            layout = kind_layout(module, types, number)
            name = layout.kind
            blueprint = expert_kind(layout, (module.width, module.width), expert)
            if self.blueprints.setdefault(name, blueprint) == blueprint:
                self._arithmetic[name] = expert, module.width
                return name
            number += 1


class HalfExperts:
    """The graphs of the same kinds that compute in half precision, between float32 rows."""

    def __init__(
        self, kinds: ExpertKinds, model: Any, modules: Sequence[ExpertsModule], compute: Half
    ) -> None:
        """`model`, made to compute in `compute`, may lie on the meta device."""
        self._compute: Half = compute
        self._kinds = kinds
        self._experts: dict[str, tuple[Expert, int]] = {}
        for kind, module in zip(kinds.of, modules, strict=True):
            if kind not in self._experts:
                expert = swiglu if module.swiglu else trace_expert(model, module, compute)
                self._experts[kind] = _between_floats(expert), module.width

    def graph(self, kind: str) -> bytes:
        """The graph of one expert on any number of rows."""
        expert, width = self._experts[kind]
        b = self._builder("expert")
        x = b.input("x", "f32", ["rows", width])
        weights = expert_inputs(b, self._kinds.blueprints[kind].layout)
        b.output(expert(b, x, weights), "y", "f32", ["rows", width])
        return fit_model(b.build())

    def fused(self, kind: str, top_k: int) -> bytes:
        """The graph of `top_k` experts, unrolled, for one token; gates weigh in float32."""
        expert, width = self._experts[kind]
        layout = self._kinds.blueprints[kind].layout
        return fit_model(_fused(self._builder("fused"), layout, expert, width, top_k))

    def _builder(self, name: str) -> GraphBuilder:
        return GraphBuilder(name, compute=self._compute)


def _fused(b: GraphBuilder, layout: ShardLayout, expert: Expert, width: int, top_k: int) -> bytes:
    x, gates = b.input("x", "f32", [1, width]), b.input("gates", "f32", [1, top_k])
    y = fused_experts(b, x, gates, top_k, layout, expert)
    b.output(y, "y", "f32", [1, width])
    return b.build()


def _between_floats(expert: Expert) -> Expert:
    """The expert in what the builder computes in, on rows in float32."""

    def widened(b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
        return b.cast(expert(b, b.cast(x, b.compute), weights), "f32")

    return widened


def _behaviour(module: Any, described: ExpertsModule) -> Hashable:
    """What decides what an expert computes: class, sizes, numbers it keeps, and its activation."""
    kept = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
    }
    return type(module), repr(module), repr(sorted(kept.items())), repr(described.tensors)


def kind_layout(module: ExpertsModule, types: Mapping[str, DType], number: int) -> ShardLayout:
    """The shards of experts whose tensors are stored as `types`, the `number`th kind of such."""
    base, activation = (KIND, "silu") if module.swiglu else ("expert", "traced")
    name = base if number == 1 else f"{base}_{number}"
    return plan_shard(
        name, activation, [(one, types[one], shape) for one, shape in module.tensors.items()]
    )
