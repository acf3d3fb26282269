"""The five pathways as kinds of expert: each a function of `x` and of the rows before it.

`x` `(T, d)` are the tokens of the call after the block's norm, `context` `(C, d)` those of
earlier calls, oldest first. Nothing else is carried: a unit that was away is exact when it
comes back. Formulas: specs/tilelli.md, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from evermind_manifests.manifest import DType
from evermind_manifests.shard import ShardLayout, plan_shard

from ...blueprint import KindBlueprint
from ...onnx_graph import GraphBuilder
from ..kind import expert_kind
from ..linear import Weight
from .params import STATE_VECTORS, BlockDims
from .storage import Matrix, MatrixSpec

CONTEXT: Final = "context"
_SLICE_END: Final = 2**31 - 1
# Below the smallest float32: its logarithm is finite, and a power of it is 0 from the second on.
_SMALLEST: Final = 1e-38


def scope_of(pathway: str) -> Literal["token", "sequence"]:
    """Only `dense` looks at one token alone."""
    return "token" if pathway == "dense" else "sequence"


def matrices(dims: BlockDims, pathway: str, storage: str) -> dict[str, MatrixSpec]:
    """A unit's matrices by tensor name."""
    return {
        name: MatrixSpec(name, shape, dims.quantised(name), dims.per_row, storage)
        for name, shape in dims.unit_shapes(pathway).items()
        if name not in STATE_VECTORS
    }


def pathway_kind(dims: BlockDims, pathway: str, storage: str) -> KindBlueprint:
    """The kind of one pathway's units."""
    layout = _layout(dims, pathway, storage)
    width = dims.d_model

    def unit(b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
        found = {
            name: Matrix(b, spec, weights)
            for name, spec in matrices(dims, pathway, storage).items()
        }
        if pathway == "dense":
            up = b.op("Gelu", found["up.weight"].linear(x))
            return found["down.weight"].linear(up)
        context = b.input(CONTEXT, "f32", ["C", width])
        if pathway == "state":
            return _state(b, x, context, {name: weights[name].value for name in STATE_VECTORS})
        if pathway == "sparse":
            return _attention(b, x, context, found, dims)
        kernel = dims.kernel if pathway == "local" else dims.wide
        return _convolution(b, x, context, found["weight"].values(), width, kernel)

    return expert_kind(layout, (width, width), unit, scope_of(pathway))


def _layout(dims: BlockDims, pathway: str, storage: str) -> ShardLayout:
    tensors: list[tuple[str, DType, tuple[int, ...]]] = []
    for spec in matrices(dims, pathway, storage).values():
        tensors += spec.layout()
    if pathway == "state":
        tensors += [(name, "f32", shape) for name, shape in dims.unit_shapes(pathway).items()]
    activation = "gelu" if pathway == "dense" else "none"
    return plan_shard(pathway, activation, tensors)


def _convolution(b: GraphBuilder, x: str, context: str, taps: str, width: int, kernel: int) -> str:
    """Depthwise and causal; the last of the `taps` `(d, k)` is the current token's."""
    window = x
    if kernel > 1:
        last = _rows(b, context, 1 - kernel)
        padded = b.op("Pad", last, b.const([kernel - 1, 0, 0, 0]))
        window = b.op("Concat", _rows(b, padded, 1 - kernel), x, axis=0)
    # (k-1+T, d) -> (1, d, k-1+T) -> (1, d, T) -> (T, d)
    signal = b.op("Unsqueeze", b.op("Transpose", window, perm=[1, 0]), b.const([0]))
    weight = b.op("Unsqueeze", taps, b.const([1]))
    result = b.op("Conv", signal, weight, group=width, kernel_shape=[kernel])
    return str(b.op("Transpose", b.op("Squeeze", result, b.const([0])), perm=[1, 0]))


def _rows(b: GraphBuilder, value: str, begin: int) -> str:
    return str(b.op("Slice", value, b.const([begin]), b.const([_SLICE_END]), b.const([0])))


def _state(b: GraphBuilder, x: str, context: str, w: Mapping[str, str]) -> str:
    """`s_t = a s_{t-1} + b x_t`, `y_t = c s_t`, with `a = tanh(a_raw)`.

    The state before the first token is replayed from the context in one sum, `a^n` being
    `sign(a)^n exp(n log|a|)`: all bounded by 1, whatever the length.
    """
    a = b.op("Tanh", w["a_raw"])
    zero = b.const(0.0, np.float32)
    count = b.op("Squeeze", b.op("Shape", context, end=1), b.const([0]))
    one = b.const(1)
    age = b.cast(b.op("Range", b.op("Sub", count, one), b.const(-1), b.const(-1)), "f32")
    age = b.op("Unsqueeze", age, b.const([1]))
    magnitude = b.op("Max", b.op("Abs", a), b.const(_SMALLEST, np.float32))
    powers = b.op("Exp", b.op("Mul", age, b.op("Log", magnitude)))
    odd = b.op("Mod", age, b.const(2.0, np.float32), fmod=1)
    negative = b.cast(b.op("Less", a, zero), "f32")
    flips = b.op("Mul", b.op("Mul", odd, negative), b.const(-2.0, np.float32))
    signed = b.op("Mul", powers, b.op("Add", flips, b.const(1.0, np.float32)))
    earlier = b.op("ReduceSum", b.op("Mul", signed, context), b.const([0]), keepdims=0)
    initial = b.op("Mul", earlier, w["b"])

    body = b.body()
    width = "d"
    s = body.input("s", "f32", [width])
    driven = body.input("driven", "f32", [width])
    fresh = body.op("Add", body.op("Mul", a, s), driven)
    body.output(fresh, "s_out", "f32", [width])
    body.output(fresh, "row", "f32", [width])
    _, states = b.scan(body, initial, b.op("Mul", x, w["b"]), states=1)
    return str(b.op("Mul", states, w["c_out"]))


def _attention(
    b: GraphBuilder, x: str, context: str, w: Mapping[str, Matrix], dims: BlockDims
) -> str:
    """One causal head over `context` and `x` that keeps the `top_k` best scores of a token.

    Keys and values are never formed: `q . (Wk h) = (q Wk) . h`, and the weighted sum of
    `Wv h` is `Wv` of the weighted sum of `h`. One token costs O(C d), not O(C d^2).
    """
    scale = b.const(1 / math.sqrt(dims.d_head), np.float32)
    query = w["Wk.weight"].transposed(b.op("Mul", w["Wq.weight"].linear(x), scale))
    before = b.op("MatMul", query, b.op("Transpose", context, perm=[1, 0]))
    within = b.op("MatMul", query, b.op("Transpose", x, perm=[1, 0]))
    count = b.op("Squeeze", b.op("Shape", x, end=1), b.const([0]))
    places = b.op("Range", b.const(0), count, b.const(1))
    rows = b.op("Unsqueeze", places, b.const([1]))
    hidden = b.op("Less", rows, b.op("Unsqueeze", places, b.const([0])))
    within = b.op("Where", hidden, b.const(-np.inf, np.float32), within)
    scores = b.op("Concat", before, within, axis=1)
    kept = b.op("Min", b.const([dims.top_k]), b.op("Shape", scores, start=1))
    best, chosen = b.op("TopK", scores, kept, outputs=2, axis=-1, largest=1, sorted=1)
    empty = b.op("Expand", b.const(0.0, np.float32), b.op("Shape", scores))
    weights = b.op("ScatterElements", empty, chosen, b.op("Softmax", best, axis=-1), axis=1)
    sizes = b.op("Concat", b.op("Shape", context, end=1), b.op("Shape", x, end=1), axis=0)
    then, now = b.op("Split", weights, sizes, outputs=2, axis=1)
    mixed = b.op("Add", b.op("MatMul", then, context), b.op("MatMul", now, x))
    return w["Wv.weight"].linear(mixed)
