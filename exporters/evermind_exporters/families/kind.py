"""A kind of expert from one description of its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from evermind_manifests.manifest import EXTERNAL_EXPERT_LOCATION
from evermind_manifests.shard import ShardLayout

from ..blueprint import KindBlueprint
from ..onnx_graph import ExternalTensor, GraphBuilder
from .linear import Weight, as_float


class Expert(Protocol):
    """One expert's arithmetic."""

    def __call__(self, b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
        """Add `Expert(x)` to `b` for `x` `(rows, d_in)` in float32; gives `(rows, d_out)`."""


def expert_kind(
    layout: ShardLayout,
    widths: tuple[int, int],
    expert: Expert,
    scope: Literal["token", "sequence"] = "token",
) -> KindBlueprint:
    """Both graphs of a kind whose experts take `widths[0]` features and give `widths[1]`."""
    as_inputs = GraphBuilder("expert")
    external = {
        spec.name: ExternalTensor(
            EXTERNAL_EXPERT_LOCATION, spec.dtype, spec.shape, spec.offset, spec.bytes
        )
        for spec in layout.tensors
    }
    as_files = GraphBuilder("expert", external)
    for b in (as_inputs, as_files):
        x = b.input("x", "f32", ["rows", widths[0]])
        weights = expert_inputs(b, layout) if b is as_inputs else _mounted(b, layout)
        b.output(expert(b, x, weights), "y", "f32", ["rows", widths[1]])
    return KindBlueprint(as_inputs.build(), as_files.build(), layout, scope)


def expert_inputs(b: GraphBuilder, layout: ShardLayout, prefix: str = "") -> dict[str, Weight]:
    """Declare an expert's tensors as the graph inputs `{prefix}{tensor}`."""
    return {
        spec.name: Weight(
            b.input(prefix + spec.name, spec.dtype, spec.shape), spec.dtype, spec.shape
        )
        for spec in layout.tensors
    }


def fused_experts(
    b: GraphBuilder,
    x: str,
    gates: str,
    top_k: int,
    layout: ShardLayout,
    expert: Expert,
    base: str | None = None,
) -> str:
    """`base + sum_i gates[:, i] * Expert_i(x)` for one token, the k experts unrolled.

    Adds in selection order. The experts' tensors are declared as the inputs
    `expert{i}.{tensor}`, which a decode step's `experts` binds; `x` is `(1, d_in)`, `gates`
    `(1, k)`, `base` `(1, d_out)`, all in float32.
    """
    total = base
    for i in range(top_k):
        y = expert(b, x, expert_inputs(b, layout, f"expert{i}."))
        gate = b.op("Slice", gates, b.const([i]), b.const([i + 1]), b.const([1]))
        part = b.op("Mul", y, gate)
        total = part if total is None else b.op("Add", total, part)
    assert total is not None, "a layer routes to at least one expert"
    return total


def _mounted(b: GraphBuilder, layout: ShardLayout) -> dict[str, Weight]:
    """The tensors as external initializers; half precision is cast to float32.

    A runtime that mounts a shard folds the casts once, when it creates the session.
    """
    weights = {}
    for spec in layout.tensors:
        weight = Weight(b.weight(spec.name), spec.dtype, spec.shape)
        if spec.dtype in ("f16", "bf16"):
            weight = Weight(as_float(b, weight), "f32", spec.shape)
        weights[spec.name] = weight
    return weights
