"""What introspection can ask of xLSTM and memory: values a graph computes for it alone.

Source: specs/synapse.md, section 5. Names there differ where they promise something else:
`memory_norms` are norms of the normalised read, and the gates are the first units of head 0.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from evermind_manifests.manifest import ValueSpec

from ...family import Config
from ...onnx_graph import GraphBuilder
from .blocks import MemoryValues, XlstmValues

# Observation → graph value and type.
Observed: TypeAlias = dict[str, tuple[str, ValueSpec]]

_MOST_GATES: Final = 8


def of_xlstm(b: GraphBuilder, found: XlstmValues, config: Config) -> Observed:
    """Gate values of the first units, and the norm of each head's read."""
    heads = config["n_heads"]
    count = min(heads, _MOST_GATES)
    gates = {
        "input_gate": found.input_gate,
        "forget_gate": found.forget_gate,
        "output_gate": found.output_gate,
    }
    observed: Observed = {
        name: (
            b.op("Slice", value, b.const([0]), b.const([count]), b.const([1])),
            ValueSpec(dtype="f32", shape=("T", count)),
        )
        for name, value in gates.items()
    }
    return observed | {"memory_norms": _norms(b, found.read, heads)}


def of_memory(b: GraphBuilder, found: MemoryValues, config: Config) -> Observed:
    """Of each token and head: what was read, and how strongly what was written."""
    heads = config["n_heads"]
    squares = b.op("Mul", found.memory, found.memory)
    filled = b.op("Sqrt", b.op("ReduceSum", squares, b.const([1, 2]), keepdims=0))
    return {
        "read_norm": _norms(b, found.read, heads),
        "write_strength": (found.gate, ValueSpec(dtype="f32", shape=("T", heads))),
        "write_key_norm": _norms(b, found.key, heads),
        "write_value_norm": _norms(b, found.value, heads),
        "memory_utilization": (filled, ValueSpec(dtype="f32", shape=(heads,))),
    }


def _norms(b: GraphBuilder, value: str, heads: int) -> tuple[str, ValueSpec]:
    """The Euclidean norm of each head's vector: `(T, A, D)` → `(T, A)`."""
    norms = b.op("ReduceL2", value, b.const([-1]), keepdims=0)
    return norms, ValueSpec(dtype="f32", shape=("T", heads))
