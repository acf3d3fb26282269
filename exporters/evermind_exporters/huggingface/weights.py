"""How weights enter a segment's graph: as they are where it computes in their dtype, else cast.

Large matrices of half precision are cast to float32 in blocks that fit a core's cache, as experts'
are (`families/linear.py`); the blocks are read where they lie, so a matrix is never held in
float32. The rows that no whole block is left for make one of their own. Other weights are cast
whole: ONNX Runtime does that once, when it creates the session.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from evermind_manifests.dtypes import ITEMSIZE, tensor_bytes

from ..families.linear import block_rows
from ..onnx_graph import ONNX_DTYPES, ExternalTensor, external_tensor
from .nodes import taken
from .trunk import LARGE

if TYPE_CHECKING:
    import onnx

_FLOAT = ONNX_DTYPES["f32"]
_CONTRIB = "com.microsoft"


def weigh(
    nodes: Iterable[onnx.NodeProto],
    weights: Mapping[str, ExternalTensor],
    taken_as: Mapping[str, int] | None = None,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes over `weights` as they are stored, and the initializers that hold those.

    `nodes` take the weights, by name, for the TensorProto.DataType that `taken_as` has for them,
    by default float32.
    """
    graph = _Graph(weights, taken_as or {})
    for node in nodes:
        graph.add(node)
    return graph.casts + graph.nodes, list(graph.initializers.values())


class _Graph:
    def __init__(self, weights: Mapping[str, ExternalTensor], taken_as: Mapping[str, int]) -> None:
        self._weights = weights
        self._taken_as = taken_as
        self._cast: set[str] = set()
        self.casts: list[onnx.NodeProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def add(self, node: onnx.NodeProto) -> None:
        other = [name for name in node.input if self._is_other(name)]
        if other and node.op_type == "Gather" and node.input[0] in other:
            self._gather(node)
        elif len(node.input) > 1 and node.input[1] in other and self._is_large_linear(node):
            self._linear(node)
        else:
            for name in taken(node):
                if name in self._weights:
                    self._take(name)
            self.nodes.append(node)

    def _is_other(self, name: str) -> bool:
        """Whether a weight is stored as another dtype than it is taken for."""
        if name not in self._weights:
            return False
        return ONNX_DTYPES[self._weights[name].dtype] != self._as(name)

    def _as(self, name: str) -> int:
        return self._taken_as.get(name, _FLOAT)

    def _is_large_linear(self, node: onnx.NodeProto) -> bool:
        from onnx import helper

        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if (node.domain, node.op_type) not in ((_CONTRIB, "FusedMatMul"), ("", "Gemm")):
            return False
        turned = given.pop("transB", 0)
        neutral = {"alpha": 1.0, "beta": 1.0}
        rows, *width = self._weights[node.input[1]].shape
        return (
            turned == 1
            and self._as(node.input[1]) == _FLOAT
            and all(value == neutral.get(name, 0) for name, value in given.items())
            and len(width) == 1
            and rows * width[0] >= LARGE
        )

    def _take(self, name: str) -> None:
        """Have a weight whole and as it is taken, under its own name."""
        from onnx import helper

        if not self._is_other(name):
            self._stored(name, self._weights[name])
        elif name not in self._cast:
            self._cast.add(name)
            stored = self._stored(f"{name}.stored", self._weights[name])
            self.casts.append(helper.make_node("Cast", [stored], [name], to=self._as(name)))

    def _gather(self, node: onnx.NodeProto) -> None:
        from onnx import helper

        name = node.input[0]
        rows = f"{node.output[0]}.stored"
        gather = helper.make_node(
            "Gather",
            [self._stored(f"{name}.stored", self._weights[name]), node.input[1]],
            [rows],
        )
        gather.attribute.extend(node.attribute)
        cast = helper.make_node("Cast", [rows], [node.output[0]], to=self._as(name))
        self.nodes += [gather, cast]

    def _linear(self, node: onnx.NodeProto) -> None:
        """`x W^T`, a block of W's rows at a time, and what rows are left."""
        from onnx import TensorProto, helper

        x, name = node.input[:2]
        result = node.output[0]
        spec = self._weights[name]
        out, width = spec.shape
        rows = block_rows(out, width)
        if rows == out:  # no divisor of any use
            rows = max(1, LARGE // width)
        blocks, rest = divmod(out, rows)
        bits = ONNX_DTYPES[spec.dtype]
        stacked = self._part(name, "blocks", 0, (blocks, rows, width))
        block, cast, product = (f"{result}.{one}" for one in ("block", "cast", "product"))
        body = helper.make_graph(
            [
                helper.make_node("Cast", [block], [cast], to=_FLOAT),
                _product(x, cast, product),
            ],
            f"{result}.body",
            [helper.make_tensor_value_info(block, bits, [rows, width])],
            [helper.make_tensor_value_info(product, TensorProto.FLOAT, None)],
        )
        # The blocks' axis goes before the last: (…, blocks, rows), which is (…, out) in memory.
        self.nodes += [
            helper.make_node(
                "Scan",
                [stacked],
                [f"{result}.stacked"],
                body=body,
                num_scan_inputs=1,
                scan_output_axes=[-2],
            ),
            helper.make_node("Shape", [x], [f"{result}.rows"], start=0, end=-1),
            helper.make_node(
                "Concat", [f"{result}.rows", self._minus_one()], [f"{result}.shape"], axis=0
            ),
        ]
        found = f"{result}.main"
        self.nodes.append(
            helper.make_node("Reshape", [f"{result}.stacked", f"{result}.shape"], [found])
        )
        if rest:
            last = self._part(name, "rest", blocks * rows, (rest, width))
            self.nodes += [
                helper.make_node("Cast", [last], [f"{result}.last"], to=_FLOAT),
                _product(x, f"{result}.last", f"{result}.end"),
                helper.make_node("Concat", [found, f"{result}.end"], [f"{result}.all"], axis=-1),
            ]
            found = f"{result}.all"
        for bias in (one for one in node.input[2:] if one):
            if bias in self._weights:
                self._take(bias)
            self.nodes.append(helper.make_node("Add", [found, bias], [f"{result}.biased"]))
            found = f"{result}.biased"
        self.nodes.append(helper.make_node("Identity", [found], [result]))

    def _part(self, name: str, part: str, begin: int, shape: tuple[int, ...]) -> str:
        """Rows of a matrix from `begin` on, as an initializer of this shape."""
        spec = self._weights[name]
        row = spec.shape[1] * ITEMSIZE[spec.dtype]
        place = ExternalTensor(
            spec.location,
            spec.dtype,
            shape,
            spec.offset + begin * row,
            tensor_bytes(spec.dtype, shape),
        )
        return self._stored(f"{name}.{part}", place)

    def _stored(self, name: str, place: ExternalTensor) -> str:
        self.initializers.setdefault(name, external_tensor(name, place))
        return name

    def _minus_one(self) -> str:
        import numpy as np
        from onnx import numpy_helper

        name = "weigh_minus_one"
        self.initializers.setdefault(name, numpy_helper.from_array(np.array([-1]), name))
        return name


def _product(x: str, matrix: str, result: str) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("FusedMatMul", [x, matrix], [result], domain=_CONTRIB, transB=1)
