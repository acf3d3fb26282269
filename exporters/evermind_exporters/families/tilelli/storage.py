"""How a unit's matrices are stored, and how a graph computes with them.

A quantised matrix is its trits and `alpha`, whatever the storage: packed by row in base-3
(`ternary`, 1.6 bits a weight) or two-bit codes (`ternary2`), or as plain f16, bf16 or f32
numbers, so that packages of one model in different storage compute the same function.

Packed trits are decoded in the graph, digit by digit for the whole matrix: a plane holds
every fifth (or fourth) column, so that `x W^T` is a sum of products with planes and no trit
is moved. At 1024x1024, one token, one thread this takes 3.5 times float32 weights; a lookup
table of whole bytes takes 8.5 times (BENCHMARKS.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from evermind_manifests.manifest import DType

from ...blueprint import FloatArray
from ...checkpoints import ternary
from ...family import Arrays
from ...onnx_graph import GraphBuilder
from ..linear import Weight, computed

ALPHA: Final = ".alpha"


# The two packed storages and how many trits a byte of theirs holds.
GROUPS: Final = {"ternary": ternary.BASE3_TRITS, "ternary2": ternary.TWO_BIT_TRITS}
STORAGES: Final = (*GROUPS, "f16", "bf16", "f32")

# A graph input or initializer of a matrix: tensor, dtype and shape.
_Tensor: TypeAlias = tuple[str, DType, tuple[int, ...]]
Layout: TypeAlias = list[_Tensor]


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """One weight in one storage.

    `shape` is the model's; as a matrix it has `shape[0]` rows. What is not `quantised` is a
    copy of the model's tensor: in a packed storage float32, else as the storage says.
    """

    name: str
    shape: tuple[int, ...]
    quantised: bool
    per_row: bool
    storage: str

    @property
    def rows(self) -> int:
        """The rows of the matrix."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """The columns of the matrix."""
        return math.prod(self.shape[1:])

    @property
    def packed(self) -> bool:
        """Whether it is stored as packed trits."""
        return self.quantised and self.storage in GROUPS

    def layout(self) -> Layout:
        """The tensors that store it."""
        if not self.quantised:
            return [(self.name, _plain(self.storage), self.shape)]
        alpha: _Tensor = (self.name + ALPHA, "f32", (self.rows if self.per_row else 1,))
        if not self.packed:
            return [(self.name, _plain(self.storage), (self.rows, self.width)), alpha]
        data = (self.rows, -(-self.width // GROUPS[self.storage]))
        return [(self.name, "u8", data), alpha]

    def arrays(self, weight: FloatArray, *, recovered: bool, where: str) -> Arrays:
        """What is stored of a quantised `weight`; float arrays are rounded by the caller.

        `recovered` weights are ternary already. Raises `CheckpointError` if they are not,
        or for a weight that is not finite.
        """
        matrix = weight.reshape(self.rows, self.width)
        if recovered:
            used = ternary.recover(matrix, where, per_row=self.per_row)
        else:
            used = ternary.ternarise(matrix, per_row=self.per_row, where=where)
        data: npt.NDArray[Any] = used.codes.astype(np.float32)
        if self.packed:
            pack = ternary.pack_base3 if self.storage == "ternary" else ternary.pack_two_bit
            data = pack(used.codes)
        return {self.name: data, self.name + ALPHA: used.alpha}


class Matrix:
    """A stored weight in a graph, `W` of `(rows, width)`; all arithmetic is in float32."""

    def __init__(self, b: GraphBuilder, spec: MatrixSpec, weights: Mapping[str, Weight]) -> None:
        self._b = b
        self._spec = spec
        self._data = weights[spec.name]
        self._alpha = weights[spec.name + ALPHA].value if spec.quantised else None

    def linear(self, x: str) -> str:
        """`x W^T` for `x` `(T, width)`."""
        b, spec = self._b, self._spec
        if not spec.packed:
            return self._scaled(b.op("Gemm", x, self._plain(), transB=1))
        columns = self._columns(x)
        planes, offset = self._planes(self._data.value)
        total = None
        for (plane, scale), part in zip(planes, columns, strict=True):
            part = part if scale == 1 else b.op("Mul", part, b.const(scale, np.float32))
            total = b.op("Gemm", part, plane, *([total] if total else []), transB=1)
        assert total is not None
        return self._scaled(b.op("Sub", total, self._offset(x, offset)))

    def transposed(self, q: str) -> str:
        """`q W` for `q` `(T, rows)`."""
        b = self._b
        q = self._scaled(q)
        if not self._spec.packed:
            return str(b.op("MatMul", q, self._plain()))
        planes, offset = self._planes(self._data.value)
        parts = [
            product if scale == 1 else b.op("Mul", product, b.const(scale, np.float32))
            for plane, scale in planes
            for product in [b.op("MatMul", q, plane)]
        ]
        return str(b.op("Sub", self._interleaved(parts), self._offset(q, offset)))

    def values(self) -> str:
        """`W` itself."""
        b = self._b
        if not self._spec.packed:
            plain = b.op("Reshape", self._plain(), b.const([self._spec.rows, self._spec.width]))
            return self._scaled_rows(plain, self._alpha)
        return self._scaled_rows(self._unpacked(self._data.value), self._alpha)

    def lookup(self, ids: str) -> str:
        """The rows `ids` `(T,)` i64 of `W`."""
        b = self._b
        alpha = self._alpha
        if alpha and self._spec.per_row:
            alpha = b.op("Gather", alpha, ids, axis=0)
        data = b.op("Gather", self._data.value, ids, axis=0)
        if self._spec.packed:
            return self._scaled_rows(self._unpacked(data), alpha)
        return self._scaled_rows(computed(b, self._data._replace(value=data)), alpha)

    def _plain(self) -> str:
        return computed(self._b, self._data)

    def _scaled(self, y: str) -> str:
        """Columns of `y` `(T, rows)` times alpha."""
        return y if self._alpha is None else str(self._b.op("Mul", y, self._alpha))

    def _scaled_rows(self, matrix: str, alpha: str | None) -> str:
        if alpha is None:
            return matrix
        if self._spec.per_row:
            alpha = self._b.op("Unsqueeze", alpha, self._b.const([1]))
        return str(self._b.op("Mul", matrix, alpha))

    def _offset(self, x: str, offset: float) -> str:
        """What planes are off by: digits begin at 0 and trits at -1."""
        b = self._b
        total = b.op("ReduceSum", x, b.const([1]), keepdims=1)
        return total if offset == 1 else str(b.op("Mul", total, b.const(offset, np.float32)))

    def _columns(self, x: str) -> list[str]:
        """`x` `(T, width)` as one `(T, bytes)` for each trit of a byte."""
        b = self._b
        group = GROUPS[self._spec.storage]
        size = -(-self._spec.width // group)
        if missing := size * group - self._spec.width:
            x = b.op("Pad", x, b.const([0, 0, 0, missing]))
        split = b.op("Reshape", x, b.const([-1, size, group]))
        parts = b.op("Split", split, outputs=group, axis=2, num_outputs=group)
        return [b.op("Squeeze", part, b.const([2])) for part in parts]

    def _planes(self, data: str) -> tuple[list[tuple[str, float]], float]:
        """`([(plane, scale), …], offset)`: a byte's trit i is `plane_i * scale_i - offset`.

        `data` `(rows, bytes)` u8; planes are `(rows, bytes)` f32.
        """
        b = self._b
        if self._spec.storage == "ternary":
            third, sixth, three = (b.const(v, np.float32) for v in (1 / 3, 1 / 6, 3))
            planes: list[tuple[str, float]] = []
            rest = b.cast(data, "f32")
            for _ in range(ternary.BASE3_TRITS - 1):
                # Exact for whole numbers below 243: thirds are 1/3 apart, and 1/6 is between.
                above = b.op("Floor", b.op("Add", b.op("Mul", rest, third), sixth))
                planes.append((b.op("Sub", rest, b.op("Mul", above, three)), 1.0))
                rest = above
            return [*planes, (rest, 1.0)], 1.0
        # Codes 3, 0, 1 become 1, 2, 3; each stays where it is in the byte.
        shifted = b.op("BitwiseXor", data, b.const(0b10101010, np.uint8))
        return [
            (b.cast(b.op("BitwiseAnd", shifted, b.const(3 << 2 * i, np.uint8)), "f32"), 4.0**-i)
            for i in range(ternary.TWO_BIT_TRITS)
        ], 2.0

    def _unpacked(self, data: str) -> str:
        """Trits `(rows, width)` f32 of `data` `(rows, bytes)`."""
        b = self._b
        planes, offset = self._planes(data)
        parts = [
            plane if scale == 1 else b.op("Mul", plane, b.const(scale, np.float32))
            for plane, scale in planes
        ]
        return str(b.op("Sub", self._interleaved(parts), b.const(offset, np.float32)))

    def _interleaved(self, parts: list[str]) -> str:
        """Planes `(rows, bytes)` as the matrix `(rows, width)` they are the columns of."""
        b = self._b
        width = self._spec.width
        stacked = b.op("Concat", *(b.op("Unsqueeze", part, b.const([0])) for part in parts), axis=0)
        joined = b.op("Transpose", stacked, perm=[1, 2, 0])
        size = -(-width // len(parts)) * len(parts)
        flat = b.op("Reshape", joined, b.const([-1, size]))
        if size == width:
            return str(flat)
        return str(b.op("Slice", flat, b.const([0]), b.const([width]), b.const([1])))


def _plain(storage: str) -> DType:
    return "f32" if storage in GROUPS else cast(DType, storage)
