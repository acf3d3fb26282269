"""A thin builder over `onnx.helper`: name things once, point weights at external files.

Graphs are weightless. A weight is either a graph input (an expert's tensors) or an
initializer whose data lies in another file of the package (`ExternalTensor`).

onnx is imported when the first graph is built: whoever asks a family for its configuration
or shapes only (the models, training) does without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from evermind_manifests.manifest import DType

if TYPE_CHECKING:
    import onnx

# RMSNormalization stands in the standard from opset 23; ONNX Runtime 1.23 and later run it.
OPSET = 23
IR_VERSION = 11

# TensorProto.DataType, onnx.proto.
ONNX_DTYPES: dict[DType, int] = {
    "f32": 1,
    "u8": 2,
    "i32": 6,
    "i64": 7,
    "bool": 9,
    "f16": 10,
    "f64": 11,
    "bf16": 16,
}


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """Where a tensor's bytes lie: a file beside the graphs, an offset and a length in bytes."""

    location: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    bytes: int


def external_tensor(name: str, spec: ExternalTensor) -> onnx.TensorProto:
    """An initializer whose data lies where `spec` says."""
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=ONNX_DTYPES[spec.dtype])
    tensor.dims.extend(spec.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    fields = {"location": spec.location, "offset": spec.offset, "length": spec.bytes}
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class GraphBuilder:
    """Collects nodes, then `build` gives the serialized model.

    `external` lists the tensors that `weight` may refer to. `compute` is the dtype of products
    with weights.
    """

    def __init__(
        self,
        name: str,
        external: Mapping[str, ExternalTensor] | None = None,
        compute: DType = "f32",
    ) -> None:
        self.compute: DType = compute
        self._name = name
        self._external = external or {}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._given: list[tuple[str, str]] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._counter = 0
        self._outer: GraphBuilder | None = None

    def input(self, name: str, dtype: DType, dims: Sequence[int | str]) -> str:
        """Declare a graph input; returns its name."""
        import onnx

        info = onnx.helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], list(dims))
        self._inputs.append(info)
        return name

    def output(self, value: str, name: str, dtype: DType, dims: Sequence[int | str]) -> None:
        """Declare `value` as the graph output `name`."""
        import onnx

        self._given.append((value, name))
        info = onnx.helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], list(dims))
        self._outputs.append(info)

    def weight(self, name: str) -> str:
        """Use the external tensor `name`; returns its name."""
        if self._outer:
            return self._outer.weight(name)
        if name not in self._initializers:
            tensor = external_tensor(name, self._external[name])
            self._initializers[name] = tensor
        return name

    def const(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """A small constant stored in the graph; equal constants are stored once."""
        import onnx

        if self._outer:
            return self._outer.const(value, dtype)
        array = np.asarray(value, dtype=dtype)
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add one node; returns its output name, or a tuple of them when `outputs` > 1."""
        import onnx

        self._counter += 1
        # A name of the graph around may be used in here, so none may be given twice.
        prefix = f"{self._name}." if self._outer else ""
        names = [f"{prefix}{op_type}_{self._counter}_{i}" for i in range(outputs)]
        self._nodes.append(onnx.helper.make_node(op_type, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def copy(self, node: onnx.NodeProto, inputs: Sequence[str]) -> list[str]:
        """Add a node like `node`, of any graph, on `inputs`; returns its outputs' names."""
        import onnx

        self._counter += 1
        prefix = f"{self._name}." if self._outer else ""
        copied = onnx.NodeProto(op_type=node.op_type, domain=node.domain, input=inputs)
        copied.attribute.extend(node.attribute)
        copied.output.extend(
            f"{prefix}{node.op_type}_{self._counter}_{i}" if name else ""
            for i, name in enumerate(node.output)
        )
        self._nodes.append(copied)
        return list(copied.output)

    def cast(self, value: str, dtype: DType) -> str:
        """Cast `value` to `dtype`."""
        return str(self.op("Cast", value, to=ONNX_DTYPES[dtype]))

    def body(self) -> GraphBuilder:
        """A builder for a subgraph of this one, which may use this one's values."""
        self._counter += 1
        prefix = f"{self._name}." if self._outer else ""
        body = GraphBuilder(f"{prefix}body_{self._counter}", compute=self.compute)
        body._outer = self
        return body

    def scan(
        self, body: GraphBuilder, *inputs: str, states: int = 0, axis: int = 0
    ) -> tuple[str, ...]:
        """Run `body` once per slice of the inputs' first axis; returns what it gave.

        The first `states` inputs are carried from slice to slice: the body declares an
        input and an output for each, before those of the slices. The other outputs are
        stacked along a new axis `axis`. Slices are read where they lie, without a copy.
        """
        stacked = len(body._outputs) - states
        result = self.op(
            "Scan",
            *inputs,
            outputs=len(body._outputs),
            body=body._graph(),
            num_scan_inputs=len(inputs) - states,
            scan_output_axes=[axis] * stacked,
        )
        return result if isinstance(result, tuple) else (result,)

    def _graph(self) -> onnx.GraphProto:
        import onnx

        nodes = [copy_node(node) for node in self._nodes]
        made = {name for node in nodes for name in node.output}
        # A node gives an output under its own name. Copies would cost as much as small nodes,
        # and are made only of what no node of this graph gives, or what is given twice.
        renamed: dict[str, str] = {}
        copies = []
        for value, name in self._given:
            if value in made and value not in renamed:
                renamed[value] = name
            else:
                copies.append(onnx.helper.make_node("Identity", [value], [name]))
        nodes += copies
        _rename(nodes, renamed)
        return onnx.helper.make_graph(
            nodes,
            self._name,
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
        )

    def build(self) -> bytes:
        """The checked model as deterministic protobuf bytes."""
        import onnx

        graph = self._graph()
        opsets = [onnx.helper.make_opsetid("", OPSET)]
        if any(node.domain for node in self._nodes):
            opsets.append(onnx.helper.make_opsetid("com.microsoft", 1))
        model = onnx.helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="evermind-pack",
        )
        return bytes(model.SerializeToString(deterministic=True))


def copy_node(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node of its own that is the same in everything."""
    import onnx

    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied


def _rename(nodes: Iterable[onnx.NodeProto], renamed: Mapping[str, str]) -> None:
    """Rename values wherever they are made or used, in subgraphs too."""
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, renamed)
                for output in attribute.g.output:
                    output.name = renamed.get(output.name, output.name)
