"""Graphs that compute in half precision, for CUDA.

transformers' exporter gives such a graph of a model that was made in half precision: what
transformers computes in float32 then (norms, rotations, the choice of experts), the graph does too,
but for two things that are put right here. And what CUDA has no kernel for in that dtype is
computed in float32, between casts: it is never left to the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import Half

from ..onnx_graph import ONNX_DTYPES
from .cuda_kernels import KERNELS
from .nodes import taken

if TYPE_CHECKING:
    import onnx

FLOAT: Final = ONNX_DTYPES["f32"]
#: What the name of a value between graphs ends in where it is of half precision.
INSIDE: Final = ".half"
#: torch's names of what is computed in.
TORCH_DTYPES: Final = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_NORMS: Final = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
#: The halves' TensorProto.DataType.
HALVES: Final[dict[int, Half]] = {ONNX_DTYPES["f16"]: "f16", ONNX_DTYPES["bf16"]: "bf16"}


def half_values(graph: Any) -> dict[str, int]:
    """The values of an `onnx_ir.Graph` that are of half precision, with their types."""
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    return {
        value.name: int(value.dtype)
        for value in values
        if value.dtype is not None and int(value.dtype) in HALVES
    }


def fit_for_cuda(
    nodes: Sequence[onnx.NodeProto], half: MutableMapping[str, int]
) -> list[onnx.NodeProto]:
    """The nodes with casts to float32 around those that CUDA has no kernel for in half precision.

    `half` has the types of the values that are of half precision, new ones included afterwards.
    A softmax whose result is widened is computed in float32, as `softmax(…, dtype=float32)` asks:
    PyTorch's exporter (2.13) rounds its result first, which makes ties among the scores that
    experts are chosen by.
    """
    uses = Counter(name for node in nodes for name in taken(node))
    widened = {
        node.input[0]
        for node in nodes
        if node.op_type == "Cast" and _cast_to(node) == FLOAT and uses[node.input[0]] == 1
    }
    fitted: list[onnx.NodeProto] = []
    for node in nodes:
        _check_subgraphs(node, half)
        if node.op_type == "Softmax" and node.output[0] in widened:
            half.pop(node.output[0], None)
            fitted += _in_float(node, half)
        elif not _has_kernel(node, half) or _mixes(node, half):
            fitted += _in_float(node, half)
        else:
            fitted.append(node)
    return fitted


def fit_model(data: bytes) -> bytes:
    """A serialized model of standard operators, as `fit_for_cuda` has its nodes."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    typed = onnx.shape_inference.infer_shapes(model).graph
    half = {
        value.name: value.type.tensor_type.elem_type
        for value in (*typed.input, *typed.value_info, *typed.output)
        if value.type.tensor_type.elem_type in HALVES
    }
    half |= {one.name: one.data_type for one in typed.initializer if one.data_type in HALVES}
    nodes = fit_for_cuda(list(model.graph.node), half)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString(deterministic=True))


def with_float_edges(
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[str],
    outputs: Iterable[str],
    half: MutableMapping[str, int],
) -> list[onnx.NodeProto]:
    """The nodes between float32 values of these names, where they are of half precision inside.

    Widening loses nothing, and narrowing again what was widened gives the same bits: so values
    between graphs are float32, which every host can hold.
    """
    from onnx import NodeProto, helper

    from .nodes import rename

    inside = {name: f"{name}{INSIDE}" for name in (*inputs, *outputs) if name in half}
    before = [
        helper.make_node("Cast", [name], [inside[name]], to=half[name])
        for name in inputs
        if name in inside
    ]
    after = [
        helper.make_node("Cast", [inside[name]], [name], to=FLOAT)
        for name in outputs
        if name in inside
    ]
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.output[:] = [inside.get(name, name) for name in copy.output]
        copies.append(copy)
    rename(copies, inside)
    return before + copies + after


def retyped(data: bytes, found: int, wanted: int) -> bytes:
    """A serialized model with one TensorProto.DataType in the place of another, all through."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    _retype(model.graph, found, wanted)
    return bytes(model.SerializeToString(deterministic=True))


def _retype(graph: onnx.GraphProto, found: int, wanted: int) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == found:
            value.type.tensor_type.elem_type = wanted
    tensors = [*graph.initializer]
    for node in graph.node:
        for one in node.attribute:
            if one.name == "to" and one.i == found:
                one.i = wanted
            if one.HasField("t"):
                tensors.append(one.t)
            if one.HasField("g"):
                _retype(one.g, found, wanted)
    for tensor in tensors:
        if tensor.data_type == found:
            _retype_tensor(tensor, wanted)


def _retype_tensor(tensor: onnx.TensorProto, wanted: int) -> None:
    from onnx import helper, numpy_helper

    array = numpy_helper.to_array(tensor).astype(np.float32)
    with np.errstate(over="ignore"):
        array = array.astype(helper.tensor_dtype_to_np_dtype(wanted))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _has_kernel(node: onnx.NodeProto, half: MutableMapping[str, int]) -> bool:
    types = {half[name] for name in (*node.input, *node.output) if name in half}
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return node.domain == "evermind" or all(name in KERNELS[HALVES[one]] for one in types)


def _mixes(node: onnx.NodeProto, half: MutableMapping[str, int]) -> bool:
    """Whether a norm that was fused has values and weights of two types, which no kernel takes.

    So where a model keeps its norms' weights in float32 and adds one to them (Qwen3-Next).
    """
    given = [name for name in node.input if name]
    return node.op_type in _NORMS and 0 < sum(name in half for name in given) < len(given)


def _in_float(node: onnx.NodeProto, half: MutableMapping[str, int]) -> list[onnx.NodeProto]:
    """The node on float32 values, with casts before and behind it."""
    from onnx import NodeProto, helper

    inner = NodeProto()
    inner.CopyFrom(node)
    result = node.output[0] if node.output else ""
    before, after = [], []
    for at, name in enumerate(node.input):
        if name in half:
            inner.input[at] = f"{result}.float_{at}"
            before.append(helper.make_node("Cast", [name], [inner.input[at]], to=FLOAT))
    for at, name in enumerate(node.output):
        if name in half:
            inner.output[at] = f"{name}.float"
            after.append(helper.make_node("Cast", [inner.output[at]], [name], to=half[name]))
    for one in inner.attribute:
        if one.name == "value" and one.t.data_type in HALVES:
            raise UnsupportedError(f"{node.op_type}: a constant in half precision within a node")
    return [*before, inner, *after]


def _check_subgraphs(node: onnx.NodeProto, half: MutableMapping[str, int]) -> None:
    """Recurrences are computed in float32; nothing else is expected to have a graph inside."""
    for one in node.attribute:
        if one.HasField("g"):
            typed = [*one.g.input, *one.g.output, *one.g.value_info]
            inner = {value.type.tensor_type.elem_type for value in typed}
            if inner & HALVES.keys() or any(name in half for name in taken(node)):
                raise UnsupportedError(f"{node.op_type}: a graph inside it in half precision")


def _cast_to(node: onnx.NodeProto) -> int:
    return next(int(one.i) for one in node.attribute if one.name == "to")
