"""All experts of a layer in one operator, over pools that hold them side by side in float32.

For small experts the calls into the runtime cost more than the arithmetic: one graph that
finds its experts itself needs a single call per token. `com.microsoft.MoE` computes
experts of one hidden layer; it exists in ONNX Runtime only, which tests it at the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from evermind_manifests.manifest import Pool
from evermind_manifests.shard import ShardLayout

from ..onnx_graph import GraphBuilder

_NOT_CHOSEN = np.float32(-1e9)


def pooled_experts(
    b: GraphBuilder,
    x: str,
    ids: str,
    logits: str,
    pools: Sequence[str],
    *,
    experts: int,
    top_k: int,
    activation: str,
) -> str:
    """`sum_i softmax(logits)[:, i] * Expert[ids[:, i]](x)` for `x` `(T, d)`.

    `pools` are w1 `(experts, hidden, d)`, b1, w2 `(experts, d, hidden)` and b2. The operator
    wants the logits of all experts, keeps the `top_k` largest and takes their softmax: the
    `logits` of those that were chosen, `(T, top_k)`, stand among logits that nobody chooses.
    """
    shape = b.op("Concat", b.op("Shape", ids, start=0, end=1), b.const([experts]), axis=0)
    others = b.op("Expand", b.const([[_NOT_CHOSEN]], np.float32), shape)
    scores = b.op("ScatterElements", others, ids, logits, axis=1)
    return str(
        b.op(
            "MoE",
            x,
            scores,
            *pools,
            domain="com.microsoft",
            k=top_k,
            activation_type=activation,
            normalize_routing_weights=1,
        )
    )


def pool_name(layer: int, tensor: str) -> str:
    """What a pooled graph calls the input that takes a pool."""
    return f"pool.{layer}.{tensor}"


def pool_inputs(b: GraphBuilder, layer: int, experts: int, layout: ShardLayout) -> list[str]:
    """Declare the pools of one layer as graph inputs, a tensor each, in a shard's order."""
    return [
        b.input(pool_name(layer, spec.name), "f32", [experts, *spec.shape])
        for spec in layout.tensors
    ]


def pool_bindings(layer: int, layout: ShardLayout) -> dict[str, Pool]:
    """What a step binds to those inputs."""
    return {
        pool_name(layer, spec.name): Pool(layer=layer, tensor=spec.name) for spec in layout.tensors
    }
