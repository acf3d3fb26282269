"""A linear layer over weights stored in half precision.

The CPU has no half-precision matrix product, so weights are cast inside the graph. Casting a
large matrix whole writes it to memory and reads it back as float32; cast in blocks of rows that
fit the core's cache, only the half-precision bytes travel. `Scan` walks over the blocks where
they lie; `Split` would copy each of them first.
"""

from __future__ import annotations

from typing import NamedTuple

from evermind_manifests.manifest import DType

from ..onnx_graph import GraphBuilder

# Elements of a block: 2 MiB as float32. On one thread, one token and 1024 -> 4096, blocks of
# 256Ki, 512Ki, 1Mi and 2Mi elements took 0.99, 0.87, 0.89 and 0.92 times float32 weights, whole
# casts 1.19 and blocks cut by Split 1.5 (BENCHMARKS.md).
_BLOCK = 512 * 1024


class Weight(NamedTuple):
    """A graph value that holds a weight, and what it is stored as."""

    value: str
    dtype: DType
    shape: tuple[int, ...]


def linear(b: GraphBuilder, x: str, weight: Weight, bias: Weight | None = None) -> str:
    """`x W^T + bias` for `x` `(rows, in)` and `W` `(out, in)`, all in the builder's dtype."""
    out, width = weight.shape
    rows = block_rows(out, width)
    added = [computed(b, bias)] if bias else []
    if weight.dtype == "f32" or rows == out or b.compute != "f32":
        return str(b.op("Gemm", x, computed(b, weight), *added, transB=1))
    blocks = b.op("Reshape", weight.value, b.const([out // rows, rows, width]))
    body = b.body()
    block = body.input(f"{weight.value}_block", weight.dtype, [rows, width])
    product = body.op("Gemm", x, body.cast(block, "f32"), transB=1)
    body.output(product, f"{weight.value}_product", "f32", ["rows", rows])
    (stacked,) = b.scan(body, blocks, axis=1)
    product = b.op("Reshape", stacked, b.const([-1, out]))
    return str(b.op("Add", product, *added) if added else product)


def block_rows(out: int, width: int) -> int:
    """Rows of a block: the most that divide `out` and stay within a block's elements. Pure.

    All rows where no divisor gives blocks of a useful size.
    """
    most = max(1, _BLOCK // width)
    if out <= most:
        return out
    rows = next(rows for rows in range(most, 0, -1) if out % rows == 0)
    return rows if rows * 8 >= most else out


def computed(b: GraphBuilder, weight: Weight) -> str:
    """`weight` in what the graph computes in."""
    return weight.value if weight.dtype == b.compute else b.cast(weight.value, b.compute)
