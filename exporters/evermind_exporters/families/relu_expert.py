"""The routed expert of the Evermind families, `y = W2 relu(W1 x + b1) + b2`, and its layer.

Formulas: specs/evermind-formats.md, section 4.3. Router logits are computed in double and
rounded to float32 before the top-k, because the peer judges ties on the rounded values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from evermind_manifests.manifest import EXTERNAL_EXPERT_LOCATION, DType
from evermind_manifests.shard import plan_shard

from ..blueprint import KindBlueprint
from ..checkpoints.params import ffn_shapes
from ..onnx_graph import ExternalTensor, GraphBuilder
from .linear import as_float, linear

KIND = "relu-ffn"
TENSORS = tuple(ffn_shapes(0, 0))


class Routed(NamedTuple):
    """Graph values of one layer's trunk: shared output, selected ids and their gates."""

    shared: str
    ids: str
    gates: str


def expert_kind(d_model: int, hidden: int, dtype: DType) -> KindBlueprint:
    """The kind of an expert with the given dims, its weights stored as `dtype`."""
    shapes = ffn_shapes(d_model, hidden)
    layout = plan_shard(KIND, "relu", [(name, dtype, shape) for name, shape in shapes.items()])
    external = {
        spec.name: ExternalTensor(
            EXTERNAL_EXPERT_LOCATION, spec.dtype, spec.shape, spec.offset, spec.bytes
        )
        for spec in layout.tensors
    }

    as_inputs = GraphBuilder("expert")
    x = as_inputs.input("x", "f32", ["rows", d_model])
    y = expert(as_inputs, x, "", shapes, dtype)
    as_inputs.output(y, "y", "f32", ["rows", d_model])

    # A runtime that mounts a shard folds the casts once, when it creates the session.
    as_files = GraphBuilder("expert", external)
    x = as_files.input("x", "f32", ["rows", d_model])
    weights = {name: as_float(as_files, as_files.weight(name), dtype) for name in shapes}
    as_files.output(ffn(as_files, x, weights), "y", "f32", ["rows", d_model])
    return KindBlueprint(as_inputs.build(), as_files.build(), layout)


def expert(
    b: GraphBuilder, x: str, prefix: str, shapes: Mapping[str, tuple[int, ...]], dtype: DType
) -> str:
    """One expert on `x` `(rows, d)`, its tensors declared as graph inputs `{prefix}{tensor}`."""
    weights = {name: b.input(prefix + name, dtype, shape) for name, shape in shapes.items()}
    up = linear(b, x, weights["w1"], weights["b1"], shapes["w1"], dtype)
    return linear(b, b.op("Relu", up), weights["w2"], weights["b2"], shapes["w2"], dtype)


def ffn(b: GraphBuilder, x: str, weights: Mapping[str, str]) -> str:
    """`W2 relu(W1 x + b1) + b2` for `x` `(rows, d)`."""
    hidden = b.op("Relu", b.op("Gemm", x, weights["w1"], weights["b1"], transB=1))
    return str(b.op("Gemm", hidden, weights["w2"], weights["b2"], transB=1))


def route(b: GraphBuilder, x: str, prefix: str, top_k: int) -> Routed:
    """Router, top-k gates and the shared expert for `x` `(rows, d)`; weights at `prefix`."""
    router = b.cast(b.weight(f"{prefix}router.weight"), "f64")
    logits = b.cast(b.op("Gemm", b.cast(x, "f64"), router, transB=1), "f32")
    top, ids = b.op("TopK", logits, b.const([top_k]), outputs=2, axis=-1, largest=1, sorted=1)
    gates = b.op("Softmax", top, axis=-1)
    shared = ffn(b, x, {name: b.weight(f"{prefix}shared.{name}") for name in TENSORS})
    return Routed(shared, ids, gates)


def fused_experts(
    b: GraphBuilder, base: str, d_model: int, hidden: int, top_k: int, dtype: DType
) -> str:
    """`base + sum_i gates[i] * Expert_i(n)` with the k experts unrolled, weights as inputs.

    Declares the inputs `n`, `gates` and `expert{i}.{tensor}`; adds in selection order.
    """
    n = b.input("n", "f32", [1, d_model])
    gates = b.input("gates", "f32", [1, top_k])
    shapes = ffn_shapes(d_model, hidden)
    for i in range(top_k):
        y = expert(b, n, f"expert{i}.", shapes, dtype)
        gate = b.op("Slice", gates, b.const([i]), b.const([i + 1]), b.const([1]))
        base = b.op("Add", base, b.op("Mul", y, gate))
    return base
