"""The routed expert of the Evermind families, `y = W2 relu(W1 x + b1) + b2`, and its layer.

Formulas: specs/evermind-formats.md, section 4.3. Router logits are computed in double and
rounded to float32 before the top-k, because the peer judges ties on the rounded values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from evermind_manifests.manifest import DType
from evermind_manifests.shard import ShardLayout, plan_shard

from ..checkpoints.params import ffn_shapes
from ..onnx_graph import GraphBuilder
from .linear import Weight, linear

KIND = "relu-ffn"
TENSORS = tuple(ffn_shapes(0, 0))


class Routed(NamedTuple):
    """Graph values of one layer's trunk: shared output, selected ids, their logits and gates."""

    shared: str
    ids: str
    logits: str
    gates: str


def expert_layout(d_model: int, hidden: int, dtype: DType) -> ShardLayout:
    """The shards of experts with the given dims, their weights stored as `dtype`."""
    shapes = ffn_shapes(d_model, hidden)
    return plan_shard(KIND, "relu", [(name, dtype, shape) for name, shape in shapes.items()])


def expert(b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
    """One expert on `x` `(rows, d)`."""
    return with_hidden(b, x, weights)[0]


def with_hidden(b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> tuple[str, str]:
    """One expert on `x` `(rows, d)`, and its hidden values."""
    hidden = b.op("Relu", linear(b, x, weights["w1"], weights["b1"]))
    return linear(b, hidden, weights["w2"], weights["b2"]), hidden


def ffn(b: GraphBuilder, x: str, weights: Mapping[str, str]) -> str:
    """`W2 relu(W1 x + b1) + b2` for `x` `(rows, d)`."""
    hidden = b.op("Relu", b.op("Gemm", x, weights["w1"], weights["b1"], transB=1))
    return str(b.op("Gemm", hidden, weights["w2"], weights["b2"], transB=1))


def route(b: GraphBuilder, x: str, prefix: str, top_k: int) -> Routed:
    """Router, top-k gates and the shared expert for `x` `(rows, d)`; weights at `prefix`."""
    top, ids = choose(b, x, prefix, top_k)
    gates = b.op("Softmax", top, axis=-1)
    shared = ffn(b, x, {name: b.weight(f"{prefix}shared.{name}") for name in TENSORS})
    return Routed(shared, ids, top, gates)


def choose(b: GraphBuilder, x: str, prefix: str, top_k: int) -> tuple[str, str]:
    """The router alone: the best logits of `x` `(rows, d)`, and their experts' ids."""
    router = b.cast(b.weight(f"{prefix}router.weight"), "f64")
    logits = b.cast(b.op("Gemm", b.cast(x, "f64"), router, transB=1), "f32")
    top, ids = b.op("TopK", logits, b.const([top_k]), outputs=2, axis=-1, largest=1, sorted=1)
    return top, ids
