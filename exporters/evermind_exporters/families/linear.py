"""A linear layer over weights stored in half precision, for runtimes that compute in float32.

The CPU has no half-precision matrix product, so weights are cast inside the graph. Casting a
large matrix whole writes it to memory and reads it back as float32; cast in blocks of rows that
fit the core's cache, only the half-precision bytes travel.
"""

from __future__ import annotations

from evermind_manifests.manifest import DType

from ..onnx_graph import GraphBuilder

# Elements of a block: 1 MiB as float32. On one thread at 1024 -> 3584, blocks of 64Ki, 128Ki,
# 256Ki and 512Ki elements took 1.87, 1.60, 1.39 and 1.53 times float32 weights, whole casts 2.07.
_BLOCK = 256 * 1024


def linear(
    b: GraphBuilder, x: str, weight: str, bias: str, shape: tuple[int, ...], dtype: DType
) -> str:
    """`x W^T + bias` in float32, for `x` `(rows, in)` and `W` of `shape` `(out, in)`."""
    out, width = shape
    blocks = 1 if dtype == "f32" else min(out, -(-out * width // _BLOCK))
    bias = as_float(b, bias, dtype)
    if blocks == 1:
        return str(b.op("Gemm", x, as_float(b, weight, dtype), bias, transB=1))
    sizes = [out // blocks + (n < out % blocks) for n in range(blocks)]
    parts = b.op("Split", weight, b.const(sizes), outputs=blocks, axis=0)
    products = [b.op("Gemm", x, as_float(b, part, dtype), transB=1) for part in parts]
    return str(b.op("Add", b.op("Concat", *products, axis=1), bias))


def as_float(b: GraphBuilder, value: str, dtype: DType) -> str:
    """`value`, stored as `dtype`, in float32."""
    return value if dtype == "f32" else b.cast(value, "f32")
