"""The Synapse layers as graph fragments, for T tokens or for one.

Formulas: specs/synapse.md, section 2. What depends on the token before is one function of a
slice: `Scan` walks it over T tokens, and one token runs it as it stands. All in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from ...onnx_graph import GraphBuilder

# Source: specs/synapse.md, sections 1 and 2.5.
EPSILON: Final = 1e-6
GATE_CLIP: Final = 20.0

_SLICE_END: Final = 2**31 - 1
# A value and its shape, apart from the axis of tokens.
Shaped: TypeAlias = tuple[str, Sequence[int]]
# (builder, states, slices) -> (next states, outputs)
Recur: TypeAlias = Callable[[GraphBuilder, list[str], list[str]], tuple[list[str], list[str]]]


@dataclass(frozen=True, slots=True)
class Block:
    """Where a fragment goes: its builder, its weights' prefix, `"T"` or 1 token."""

    b: GraphBuilder
    prefix: str
    tokens: int | str

    def linear(self, x: str, name: str, *, bias: bool = False) -> str:
        """`x W^T (+ bias)` for `x` `(T, in)`."""
        added = [self.weight(f"{name}.bias")] if bias else []
        return str(self.b.op("Gemm", x, self.weight(f"{name}.weight"), *added, transB=1))

    def weight(self, name: str) -> str:
        """The resident tensor `name` of this place."""
        return self.b.weight(self.prefix + name)

    def under(self, prefix: str) -> Block:
        """The same place, for weights further down."""
        return Block(self.b, self.prefix + prefix, self.tokens)


def rms_norm(b: GraphBuilder, x: str, weight: str) -> str:
    """`x / sqrt(mean(x²) + 1e-6) * weight`."""
    return str(b.op("RMSNormalization", x, b.weight(weight), axis=-1, epsilon=EPSILON))


@dataclass(frozen=True, slots=True)
class MambaValues:
    """`y` `(T, d)`, and the state after: `ssm` `(N, S)`, `window` `(d_conv - 1, N)`."""

    y: str
    ssm: str
    window: str


def mamba(block: Block, x: str, ssm: str, window: str, config: Mapping[str, Any]) -> MambaValues:
    """Section 2.4, with the convolution's last inputs carried."""
    b, inner, states, rank = (
        block.b,
        config["d_inner"],
        config["d_state"],
        config["dt_rank"],
    )
    u, z = b.op("Split", block.linear(x, "in_proj"), b.const([inner, inner]), outputs=2, axis=1)
    seen = b.op("Concat", window, u, axis=0)
    last = b.op("Slice", seen, b.const([1 - config["d_conv"]]), b.const([_SLICE_END]), b.const([0]))
    a = _silu(b, _convolution(block, seen, config["d_conv"], inner))
    sizes = b.const([rank, states, states])
    r, drive, read = b.op("Split", block.linear(a, "x_proj"), sizes, outputs=3, axis=1)
    dt = b.op("Softplus", block.linear(r, "dt_proj", bias=True))
    rates = b.op("Neg", b.op("Exp", block.weight("a_log")))

    def step(b: GraphBuilder, before: list[str], now: list[str]) -> tuple[list[str], list[str]]:
        dt, dta, drive, read = now
        last_axis, first_axis = b.const([-1]), b.const([0])
        decay = b.op("Exp", b.op("Mul", b.op("Unsqueeze", dt, last_axis), rates))
        added = b.op("Mul", b.op("Unsqueeze", dta, last_axis), b.op("Unsqueeze", drive, first_axis))
        h = b.op("Add", b.op("Mul", decay, before[0]), added)
        return [h], [b.op("MatMul", h, read)]

    (after,), (y,) = _recur(
        block,
        "ssm",
        [(ssm, [inner, states])],
        [(dt, [inner]), (b.op("Mul", dt, a), [inner]), (drive, [states]), (read, [states])],
        [[inner]],
        step,
    )
    y = b.op("Add", y, b.op("Mul", a, block.weight("d")))
    return MambaValues(block.linear(b.op("Mul", y, _silu(b, z)), "out_proj"), after, last)


@dataclass(frozen=True, slots=True)
class ThalamusValues:
    """`ids`, `gates` `(T, K)`, `probabilities` `(T, E)`, `context` `(T, d)`, and the state."""

    ids: str
    gates: str
    probabilities: str
    context: MambaValues


def thalamus(
    block: Block, x: str, ssm: str, window: str, config: Mapping[str, Any], top_k: int
) -> ThalamusValues:
    """Section 2.3; ties go to the lower index, as ONNX's TopK promises. `config`: the Mamba's."""
    b = block.b
    context = mamba(block.under("mamba."), x, ssm, window, config)
    logits = block.linear(context.y, "router_proj", bias=True)
    probabilities = b.op("Softmax", logits, axis=-1)
    top, ids = b.op("TopK", probabilities, b.const([top_k]), outputs=2, axis=-1)
    gates = b.op("Div", top, b.op("ReduceSum", top, b.const([1]), keepdims=1))
    return ThalamusValues(ids, gates, probabilities, context)


@dataclass(frozen=True, slots=True)
class XlstmValues:
    """`y` `(T, d)`; the gates `(T, H)` and the normalised read `h` `(T, A, D)`; the state."""

    y: str
    input_gate: str
    forget_gate: str
    output_gate: str
    read: str
    cell: str
    normalizer: str


def xlstm(
    block: Block, x: str, cell: str, normalizer: str, config: Mapping[str, Any]
) -> XlstmValues:
    """Section 2.5."""
    b, heads, size = block.b, config["n_heads"], config["d_head"]
    split = b.const([-1, heads, size])
    low, high = (b.const(sign * GATE_CLIP, np.float32) for sign in (-1.0, 1.0))
    i, f = (
        b.op("Exp", b.op("Clip", block.linear(x, name, bias=True), low, high))
        for name in ("w_i", "w_f")
    )
    o = b.op("Sigmoid", block.linear(x, "w_o", bias=True))
    k, v, q = (block.linear(x, name) for name in ("w_k", "w_v", "w_q"))
    slices = [f, b.op("Mul", i, k), b.op("Mul", i, v), k, q]

    def step(b: GraphBuilder, before: list[str], now: list[str]) -> tuple[list[str], list[str]]:
        cell, normalizer = before
        f, ik, iv, k, q = now
        column, row = b.const([-1]), b.const([-2])
        kept = b.op("Mul", b.op("Unsqueeze", f, column), cell)
        added = b.op("Mul", b.op("Unsqueeze", iv, column), b.op("Unsqueeze", k, row))
        cell = b.op("Add", kept, added)
        normalizer = b.op("Add", b.op("Mul", f, normalizer), ik)
        read = b.op("Squeeze", b.op("MatMul", cell, b.op("Unsqueeze", q, column)), column)
        weight = b.op("ReduceSum", b.op("Mul", normalizer, q), column, keepdims=1)
        scale = b.op("Max", b.op("Abs", weight), b.const(1.0, np.float32))
        return [cell, normalizer], [b.op("Div", read, scale)]

    shape = [heads, size]
    (cell, normalizer), (read,) = _recur(
        block,
        "xlstm",
        [(cell, [heads, size, size]), (normalizer, shape)],
        [(b.op("Reshape", value, split), shape) for value in slices],
        [shape],
        step,
    )
    h = b.op("Reshape", read, b.const([-1, heads * size]))
    y = block.linear(b.op("Mul", o, h), "w_out")
    return XlstmValues(y, i, f, o, read, cell, normalizer)


@dataclass(frozen=True, slots=True)
class MemoryValues:
    """`y` `(T, d)`, x included; keys, values and reads `(T, M, m)`; gates `(T, M)`; the state."""

    y: str
    key: str
    value: str
    gate: str
    read: str
    memory: str


def fast_weights(block: Block, x: str, memory: str, config: Mapping[str, Any]) -> MemoryValues:
    """Section 2.6: each token reads, then writes."""
    b, heads, keys, values = (
        block.b,
        config["n_heads"],
        config["d_key"],
        config["d_value"],
    )
    k, q = (
        b.op("Reshape", block.linear(x, name), b.const([-1, heads, keys]))
        for name in ("w_key", "w_query")
    )
    v = b.op("Reshape", block.linear(x, "w_value"), b.const([-1, heads, values]))
    gate = b.op(
        "Mul",
        b.op("Sigmoid", block.linear(x, "w_gate")),
        b.const(config["write_strength"], np.float32),
    )
    written = b.op("Mul", b.op("Unsqueeze", gate, b.const([-1])), v)

    def step(b: GraphBuilder, before: list[str], now: list[str]) -> tuple[list[str], list[str]]:
        k, written, q = now
        column, row = b.const([-1]), b.const([-2])
        read = b.op("Squeeze", b.op("MatMul", b.op("Unsqueeze", q, row), before[0]), row)
        kept = b.op("Mul", before[0], b.const(config["decay"], np.float32))
        added = b.op("Mul", b.op("Unsqueeze", k, column), b.op("Unsqueeze", written, row))
        return [b.op("Add", kept, added)], [read]

    (memory,), (read,) = _recur(
        block,
        "memory",
        [(memory, [heads, keys, values])],
        [(k, [heads, keys]), (written, [heads, values]), (q, [heads, keys])],
        [[heads, values]],
        step,
    )
    answer = block.linear(b.op("Reshape", read, b.const([-1, heads * values])), "w_out")
    return MemoryValues(b.op("Add", x, answer), k, v, gate, read, memory)


def _recur(
    block: Block,
    label: str,
    states: Sequence[Shaped],
    slices: Sequence[Shaped],
    outputs: Sequence[Sequence[int]],
    step: Recur,
) -> tuple[list[str], list[str]]:
    """(states after, outputs with their axis of tokens) of `step` over all tokens in turn."""
    b, first = block.b, block.b.const([0])
    if block.tokens == 1:
        now = [b.op("Squeeze", value, first) for value, _ in slices]
        after, made = step(b, [value for value, _ in states], now)
        return after, [b.op("Unsqueeze", value, first) for value in made]
    body = b.body()
    before = [body.input(f"{label}_state_{n}", "f32", dims) for n, (_, dims) in enumerate(states)]
    now = [body.input(f"{label}_slice_{n}", "f32", dims) for n, (_, dims) in enumerate(slices)]
    after, made = step(body, before, now)
    for n, (value, (_, dims)) in enumerate(zip(after, states, strict=True)):
        body.output(value, f"{label}_after_{n}", "f32", dims)
    for n, (value, dims) in enumerate(zip(made, outputs, strict=True)):
        body.output(value, f"{label}_out_{n}", "f32", dims)
    given = [value for value, _ in (*states, *slices)]
    result = b.scan(body, *given, states=len(states))
    return list(result[: len(states)]), list(result[len(states) :])


def _convolution(block: Block, seen: str, kernel: int, inner: int) -> str:
    """Depthwise and causal: `seen` `(T + d_conv - 1, N)`, oldest first, gives `(T, N)`."""
    b, weight, bias = block.b, block.weight("conv1d.weight"), block.weight("conv1d.bias")
    if block.tokens == 1:
        taps = b.op("Transpose", b.op("Squeeze", weight, b.const([1])), perm=[1, 0])
        total = b.op("ReduceSum", b.op("Mul", seen, taps), b.const([0]), keepdims=1)
        return str(b.op("Add", total, bias))
    # (T+C-1, N) -> (1, N, T+C-1) -> (1, N, T) -> (T, N)
    signal = b.op("Unsqueeze", b.op("Transpose", seen, perm=[1, 0]), b.const([0]))
    result = b.op("Conv", signal, weight, bias, group=inner, kernel_shape=[kernel])
    return str(b.op("Transpose", b.op("Squeeze", result, b.const([0])), perm=[1, 0]))


def _silu(b: GraphBuilder, x: str) -> str:
    return str(b.op("Mul", x, b.op("Sigmoid", x)))
