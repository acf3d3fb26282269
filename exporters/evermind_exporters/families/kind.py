"""A kind of expert from one description of its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, Protocol

import numpy as np
from evermind_manifests.manifest import EXTERNAL_EXPERT_LOCATION
from evermind_manifests.shard import ShardLayout

from ..blueprint import KindBlueprint
from ..onnx_graph import ExternalTensor, GraphBuilder
from .linear import Weight, computed

# Source: specs/synapse.md, section 1.
SPARSITY_THRESHOLD: Final = 0.01


class Expert(Protocol):
    """One expert's arithmetic."""

    def __call__(self, b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
        """Add `Expert(x)` to `b` for `x` `(rows, d_in)` in float32; gives `(rows, d_out)`."""


class ExpertWithHidden(Protocol):
    """One expert's arithmetic, with the hidden values that its sparsity is measured on."""

    def __call__(self, b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> tuple[str, str]:
        """As `Expert`, with hidden values `(rows, hidden)` beside the result."""


def expert_kind(
    layout: ShardLayout,
    widths: tuple[int, int],
    expert: Expert,
    scope: Literal["token", "sequence"] = "token",
    with_hidden: ExpertWithHidden | None = None,
) -> KindBlueprint:
    """All graphs of a kind whose experts take `widths[0]` features and give `widths[1]`.

    The graph of statistics is made of `with_hidden`, where that is given: of each row the
    `magnitude`, `sqrt(mean(y^2))`, and the `sparsity`, the share of hidden values below 0.01
    (specs/synapse.md, section 5).
    """
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
    statistics = None if with_hidden is None else _statistics(layout, widths, with_hidden)
    return KindBlueprint(as_inputs.build(), as_files.build(), layout, scope, statistics)


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


def _statistics(layout: ShardLayout, widths: tuple[int, int], expert: ExpertWithHidden) -> bytes:
    b = GraphBuilder("expert_statistics")
    x = b.input("x", "f32", ["rows", widths[0]])
    y, hidden = expert(b, x, expert_inputs(b, layout))
    b.output(y, "y", "f32", ["rows", widths[1]])
    features = b.const([1])
    square = b.op("ReduceMean", b.op("Mul", y, y), features, keepdims=0)
    b.output(b.op("Sqrt", square), "magnitude", "f32", ["rows"])
    small = b.op("Less", b.op("Abs", hidden), b.const(SPARSITY_THRESHOLD, np.float32))
    share = b.op("ReduceMean", b.cast(small, "f32"), features, keepdims=0)
    b.output(share, "sparsity", "f32", ["rows"])
    return b.build()


def _mounted(b: GraphBuilder, layout: ShardLayout) -> dict[str, Weight]:
    """The tensors as external initializers; half precision is cast to float32.

    A runtime that mounts a shard folds the casts once, when it creates the session.
    """
    weights = {}
    for spec in layout.tensors:
        weight = Weight(b.weight(spec.name), spec.dtype, spec.shape)
        if spec.dtype in ("f16", "bf16"):
            weight = Weight(computed(b, weight), "f32", spec.shape)
        weights[spec.name] = weight
    return weights
