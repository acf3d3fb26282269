"""The kinds of experts of a model: layers whose experts compute alike share one.

An expert that is a SwiGLU has the graph of our own (`families/synapse/experts.py`). Of any other
`expert_trace.py` traces one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from evermind_manifests.manifest import DType
from evermind_manifests.shard import ShardLayout, plan_shard

from ..blueprint import KindBlueprint
from ..families.kind import Expert, expert_kind, fused_experts
from ..families.synapse.experts import KIND, swiglu
from ..onnx_graph import GraphBuilder
from .expert_trace import trace_expert
from .experts import ExpertsModule


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
        layout = self.blueprints[kind].layout
        b = GraphBuilder("fused")
        x, gates = b.input("x", "f32", [1, width]), b.input("gates", "f32", [1, top_k])
        y = fused_experts(b, x, gates, top_k, layout, expert)
        b.output(y, "y", "f32", [1, width])
        return b.build()

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
