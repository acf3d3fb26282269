"""`evermind-lm`: embedding, L x [RMSNorm, causal depthwise conv, RMSNorm, MoE], tied head.

Formulas: specs/evermind-formats.md, section 8.3. A program has L+1 segments: segment l
finishes layer l-1 (adds its experts' output) and computes layer l up to its router; the
last one is the head. State per layer: the last C-1 normalised inputs of its convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from evermind_manifests.manifest import (
    DType,
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Guess,
    Layer,
    Plan,
    Pool,
    Pooled,
    StateSpec,
    Step,
    ValueSpec,
)
from evermind_manifests.shard import ShardLayout
from evermind_runtime.lcg import Lcg

from ..blueprint import Blueprint
from ..family import Arrays, Config
from ..onnx_graph import ExternalTensor, GraphBuilder
from .evermind import EvermindFamily
from .kind import expert_kind, fused_experts
from .pooled import pool_bindings, pool_inputs, pooled_experts
from .relu_expert import (
    KIND,
    TENSORS,
    Routed,
    choose,
    expert,
    expert_layout,
    route,
    with_hidden,
)

_EMBEDDING = "token_embedding.weight"
# Source: specs/evermind-formats.md, section 8.3.
_EPSILON = 1e-5
_SLICE_END = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Dims:
    vocab: int
    d_model: int
    layers: int
    kernel: int
    hidden: int
    experts: int
    top_k: int

    @classmethod
    def of(cls, config: Config) -> _Dims:
        return cls(
            config["vocabSize"],
            config["dModel"],
            config["numLayers"],
            config["convKernel"],
            config["hiddenDim"],
            config["numExperts"],
            config["topK"],
        )


class EvermindLm(EvermindFamily):
    """See the module."""

    name = "evermind-lm"

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return [name for name in self.shapes(config) if ".experts." not in name]

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """See `ModelFamily.expert_names`."""
        prefix = f"layers.{layer}.moe.experts.{expert}."
        return {name: prefix + name for name in TENSORS}

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        uniforms = Lcg(seed).uniforms(24)
        return {"tokens": (uniforms * config["vocabSize"]).astype(np.int64)}

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        dims = _Dims.of(config)
        layout = expert_layout(dims.d_model, dims.hidden, dtype)
        graphs = {}
        for segment in range(dims.layers + 1):
            graphs[_path("prefill", segment)] = _segment(dims, segment, resident, None)
            graphs[_path("decode", segment)] = _segment(dims, segment, resident, layout)
        for layer in range(1, dims.layers):
            graphs[_path("guess", layer)] = _guess_graph(dims, layer, resident)
        graphs[_pooled_path("prefill")] = _pooled(dims, "T", resident, layout)
        graphs[_pooled_path("decode")] = _pooled(dims, 1, resident, layout)

        state = {}
        if dims.kernel > 1:
            for layer in range(dims.layers):
                state[f"conv.{layer}"] = StateSpec(
                    dtype="f32", shape=(dims.kernel - 1, dims.d_model)
                )
        outputs = {"logits": ValueSpec(dtype="f32", shape=("T", dims.vocab))}
        for layer in range(dims.layers):
            outputs[f"ids.{layer}"] = ValueSpec(dtype="i64", shape=("T", dims.top_k))
            outputs[f"gates.{layer}"] = ValueSpec(dtype="f32", shape=("T", dims.top_k))

        per_expert = 2 * dims.d_model * dims.hidden + dims.hidden + dims.d_model
        trunk = dims.d_model * (dims.kernel + 2 + dims.experts)
        return Blueprint(
            kinds={
                KIND: expert_kind(
                    layout, (dims.d_model, dims.d_model), expert, with_hidden=with_hidden
                )
            },
            layers=tuple(
                Layer(layer=layer, kind=KIND, experts=dims.experts, top_k=dims.top_k)
                for layer in range(dims.layers)
            ),
            graphs=graphs,
            plan=Plan(
                inputs={"tokens": ValueSpec(dtype="i64", shape=("T",), limit=dims.vocab)},
                outputs=outputs,
                state=state,
                prefill=tuple(_prefill_steps(dims)),
                decode=tuple(_step(dims, "decode", segment) for segment in range(dims.layers + 1)),
                guesses=tuple(_guess(dims, layer) for layer in range(1, dims.layers)),
                pooled=Pooled(
                    prefill=(_pooled_step(dims, "prefill", layout),),
                    decode=(_pooled_step(dims, "decode", layout),),
                ),
            ),
            active_parameters=dims.vocab * dims.d_model
            + dims.layers * (trunk + (1 + dims.top_k) * per_expert),
        )


def _prefill_steps(dims: _Dims) -> list[Step]:
    steps: list[Step] = []
    for segment in range(dims.layers + 1):
        steps.append(_step(dims, "prefill", segment))
        if segment < dims.layers:
            steps.append(
                ExpertsStep(
                    layer=segment,
                    x=f"n.{segment}",
                    ids=f"ids.{segment}",
                    gates=f"gates.{segment}",
                    y=f"e.{segment}",
                )
            )
    return steps


def _step(dims: _Dims, program: str, segment: int) -> GraphStep:
    previous = segment - 1
    inputs: dict[str, str] = {}
    fused = None
    if segment == 0:
        inputs["tokens"] = "tokens"
    else:
        inputs["base"] = f"base.{previous}"
        if program == "decode":
            inputs |= {"n": f"n.{previous}", "gates": f"gates.{previous}"}
            fused = FusedExperts(layer=previous, ids=f"ids.{previous}", gates=f"gates.{previous}")
        else:
            inputs["e"] = f"e.{previous}"
    if segment == dims.layers:
        outputs = {"logits": "logits"}
    else:
        outputs = {
            "base_out": f"base.{segment}",
            "n_out": f"n.{segment}",
            "ids_out": f"ids.{segment}",
            "gates_out": f"gates.{segment}",
        }
        if dims.kernel > 1:
            inputs["conv"] = outputs["conv_out"] = f"conv.{segment}"
    return GraphStep(graph=_path(program, segment), inputs=inputs, outputs=outputs, experts=fused)


def _segment(
    dims: _Dims, segment: int, resident: Mapping[str, ExternalTensor], layout: ShardLayout | None
) -> bytes:
    """One segment's graph: for one token with fused experts, or (`None`) for T tokens."""
    tokens: int | str = "T" if layout is None else 1
    d_model = dims.d_model
    b = GraphBuilder(f"segment_{segment}", resident)
    if segment == 0:
        ids = b.input("tokens", "i64", [tokens])
        x = b.op("Gather", b.weight(_EMBEDDING), ids, axis=0)
    else:
        base = b.input("base", "f32", [tokens, d_model])
        if layout is None:
            x = b.op("Add", base, b.input("e", "f32", [tokens, d_model]))
        else:
            n = b.input("n", "f32", [1, d_model])
            gates = b.input("gates", "f32", [1, dims.top_k])
            x = fused_experts(b, n, gates, dims.top_k, layout, expert, base)
    if segment == dims.layers:
        b.output(_head(b, x), "logits", "f32", [tokens, dims.vocab])
        return b.build()
    trunk = _trunk(b, x, segment, dims, tokens)
    base = b.op("Add", trunk.residual, trunk.routed.shared)
    b.output(base, "base_out", "f32", [tokens, d_model])
    b.output(trunk.n, "n_out", "f32", [tokens, d_model])
    b.output(trunk.routed.ids, "ids_out", "i64", [tokens, dims.top_k])
    b.output(trunk.routed.gates, "gates_out", "f32", [tokens, dims.top_k])
    return b.build()


def _pooled(
    dims: _Dims, tokens: int | str, resident: Mapping[str, ExternalTensor], layout: ShardLayout
) -> bytes:
    """The whole model in one graph, over pools of experts."""
    b = GraphBuilder("model", resident)
    x = b.op("Gather", b.weight(_EMBEDDING), b.input("tokens", "i64", [tokens]), axis=0)
    y: str | None = None
    for layer in range(dims.layers):
        trunk = _pooled_trunk(b, x, y, layer, dims, tokens)
        ids, gates = trunk.routed.ids, trunk.routed.gates
        b.output(ids, f"ids.{layer}", "i64", [tokens, dims.top_k])
        b.output(gates, f"gates.{layer}", "f32", [tokens, dims.top_k])
        y = pooled_experts(
            b,
            trunk.n,
            ids,
            trunk.routed.logits,
            pool_inputs(b, layer, dims.experts, layout),
            experts=dims.experts,
            top_k=dims.top_k,
            activation="relu",
        )
        x = b.op("Add", trunk.residual, trunk.routed.shared)
    assert y is not None, "a model has layers"
    b.output(_head(b, b.op("Add", x, y)), "logits", "f32", [tokens, dims.vocab])
    return b.build()


def _pooled_step(dims: _Dims, program: str, layout: ShardLayout) -> GraphStep:
    inputs, outputs = {"tokens": "tokens"}, {"logits": "logits"}
    pools: dict[str, Pool] = {}
    for layer in range(dims.layers):
        outputs |= {f"{value}.{layer}": f"{value}.{layer}" for value in ("ids", "gates")}
        if dims.kernel > 1:
            inputs[f"conv.{layer}"] = outputs[f"conv_out.{layer}"] = f"conv.{layer}"
        pools |= pool_bindings(layer, layout)
    return GraphStep(graph=_pooled_path(program), inputs=inputs, outputs=outputs, pools=pools)


class _Trunk(NamedTuple):
    """Graph values of a layer before its experts: the residual sum, what they take, routes."""

    residual: str
    n: str
    routed: Routed


def _trunk(b: GraphBuilder, x: str, layer: int, dims: _Dims, tokens: int | str) -> _Trunk:
    """A layer up to its router."""
    prefix = f"layers.{layer}."
    n = _rms_norm(b, x, f"{prefix}norm_conv.weight")
    residual = b.op("Add", x, _convolution(b, n, prefix, dims, tokens, ""))
    n = _rms_norm(b, residual, f"{prefix}norm_moe.weight")
    return _Trunk(residual, n, route(b, n, f"{prefix}moe.", dims.top_k))


def _pooled_trunk(
    b: GraphBuilder, x: str, y: str | None, layer: int, dims: _Dims, tokens: int | str
) -> _Trunk:
    """The same of `x + y`, in fewer nodes: a small node costs as much as a hundred numbers."""
    prefix = f"layers.{layer}."
    if y is None:
        n = _rms_norm(b, x, f"{prefix}norm_conv.weight")
    else:
        x, n = _sum_and_norm(b, x, y, f"{prefix}norm_conv.weight")
    convolved = _convolution(b, n, prefix, dims, tokens, f".{layer}")
    residual, n = _sum_and_norm(b, x, convolved, f"{prefix}norm_moe.weight")
    return _Trunk(residual, n, route(b, n, f"{prefix}moe.", dims.top_k))


def _sum_and_norm(b: GraphBuilder, x: str, y: str, gain: str) -> tuple[str, str]:
    """`x + y`, and its RMS norm, in one operator of ONNX Runtime's."""
    normed, _, _, total = b.op(
        "SkipSimplifiedLayerNormalization",
        x,
        y,
        b.weight(gain),
        outputs=4,
        domain="com.microsoft",
        epsilon=_EPSILON,
    )
    return total, normed


def _head(b: GraphBuilder, x: str) -> str:
    return str(b.op("Gemm", x, b.weight(_EMBEDDING), transB=1))


def _guess(dims: _Dims, layer: int) -> Guess:
    inputs = {"base": f"base.{layer - 1}"}
    if dims.kernel > 1:
        inputs["conv"] = f"conv.{layer}"
    return Guess(layer=layer, graph=_path("guess", layer), inputs=inputs, ids="ids")


def _guess_graph(dims: _Dims, layer: int, resident: Mapping[str, ExternalTensor]) -> bytes:
    """The layer's norms, convolution and router on what is known before the experts below ran.

    On the demo's model 62 %, 97 % and 96 % of the top-2 of layers 1 to 3 are guessed right
    (without the convolution 63, 87 and 88 %; by the token before 23 to 27 %).
    """
    b = GraphBuilder(f"guess_{layer}", resident)
    x = b.input("base", "f32", [1, dims.d_model])
    prefix = f"layers.{layer}."
    n = _rms_norm(b, x, f"{prefix}norm_conv.weight")
    convolved = _convolution(b, n, prefix, dims, 1, "", keep=False)
    n = _rms_norm(b, b.op("Add", x, convolved), f"{prefix}norm_moe.weight")
    _, ids = choose(b, n, f"{prefix}moe.", dims.top_k)
    b.output(ids, "ids", "i64", [1, dims.top_k])
    return b.build()


def _rms_norm(b: GraphBuilder, x: str, gain: str) -> str:
    return str(b.op("RMSNormalization", x, b.weight(gain), axis=-1, epsilon=_EPSILON))


def _convolution(
    b: GraphBuilder,
    n: str,
    prefix: str,
    dims: _Dims,
    tokens: int | str,
    state: str,
    *,
    keep: bool = True,
) -> str:
    """The causal depthwise convolution of `n`; declares the state input, and output if kept.

    Tap j is the lag, so the taps are reversed to meet the window, which is oldest first.
    """
    taps = b.weight(f"{prefix}conv.weight")
    taps = b.op("Slice", taps, b.const([-1]), b.const([-_SLICE_END]), b.const([1]), b.const([-1]))
    window = n
    if dims.kernel > 1:
        state_dims = [dims.kernel - 1, dims.d_model]
        window = b.op("Concat", b.input(f"conv{state}", "f32", state_dims), n, axis=0)
        if keep and tokens == 1:
            last = b.op("Gather", window, b.const(list(range(1, dims.kernel))), axis=0)
        elif keep:
            last = b.op(
                "Slice", window, b.const([1 - dims.kernel]), b.const([_SLICE_END]), b.const([0])
            )
        if keep:
            b.output(last, f"conv_out{state}", "f32", state_dims)
    if tokens == 1:
        # Gather and MatMul are what Slice and ReduceSum would be, and cost less.
        products = b.op("Mul", window, b.op("Transpose", taps, perm=[1, 0]))
        return str(b.op("MatMul", b.const([[1] * dims.kernel], np.float32), products))
    # (T+C-1, d) -> (1, d, T+C-1) -> (1, d, T) -> (T, d)
    signal = b.op("Unsqueeze", b.op("Transpose", window, perm=[1, 0]), b.const([0]))
    kernel = b.op("Unsqueeze", taps, b.const([1]))
    result = b.op("Conv", signal, kernel, group=dims.d_model, kernel_shape=[dims.kernel])
    return str(b.op("Transpose", b.op("Squeeze", result, b.const([0])), perm=[1, 0]))


def _path(program: str, segment: int) -> str:
    return f"graphs/{program}_{segment:02d}.onnx"


def _pooled_path(program: str) -> str:
    return f"graphs/pooled_{program}.onnx"


FAMILY = EvermindLm()
