"""Look into an ONNX graph without running it, and refuse what a package may not contain.

A graph from a stranger must not read other files, call code from outside the operator
set, or loop without end. `inspect_graph` reads the file's structure; `graph_problems`
compares it with what is allowed. Both come before a session is ever created.
Field numbers: onnx.proto (ONNX IR version 14).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from .errors import GraphError
from .problems import Problem, problem, raise_errors
from .protobuf import Message, describe

MAX_GRAPH_BYTES: Final = 256 * 1024 * 1024
MAX_SUBGRAPH_DEPTH: Final = 8

# Loop may run 2^63 times. Scan runs once per row of an input, which recurrent families
# need to take many tokens in one call, and If runs one branch: both end.
FORBIDDEN_OPS: Final = frozenset({"Loop"})
# ONNX Runtime's own operators that compute from their inputs alone. Others reach further:
# EPContext, for one, opens a file that an attribute names.
CONTRIB_OPS: Final = frozenset(
    {
        "Attention",
        "BiasGelu",
        "DequantizeLinear",
        "DynamicQuantizeMatMul",
        "FastGelu",
        "FusedGemm",
        "FusedMatMul",
        "Gelu",
        "GroupQueryAttention",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MoE",
        "MultiHeadAttention",
        "QMoE",
        "QuantizeLinear",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)

# TensorProto.DataType: name, bytes per element. Names are a manifest's where it has one.
_ELEMENTS: Final[dict[int, tuple[str, int]]] = {
    1: ("f32", 4),
    2: ("u8", 1),
    3: ("i8", 1),
    4: ("u16", 2),
    5: ("i16", 2),
    6: ("i32", 4),
    7: ("i64", 8),
    9: ("bool", 1),
    10: ("f16", 2),
    11: ("f64", 8),
    12: ("u32", 4),
    13: ("u64", 8),
    16: ("bf16", 2),
}
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
_MAX_ELEMENTS = 1 << 40

GraphDims: TypeAlias = tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class GraphValue:
    """An input or output: a dimension is a number, a name, or None; dims None: any rank."""

    name: str
    dtype: str
    dims: GraphDims | None


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A tensor whose data lies in another file, from `offset`, `length` bytes long."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    location: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """What a graph is made of. `inputs` are those a caller must bind."""

    ir_version: int
    opsets: Mapping[str, int]
    inputs: Mapping[str, GraphValue]
    outputs: Mapping[str, GraphValue]
    ops: frozenset[tuple[str, str]]
    external: tuple[ExternalTensor, ...]
    features: frozenset[str]


def inspect_graph(data: bytes | memoryview, where: str) -> GraphInfo:
    """Read an ONNX file's structure, subgraphs included; weights are not looked at.

    Raises `GraphError` (a `ManifestError`) for a file that is not a well-formed model,
    also for lengths that do not fit, unknown fields and subgraphs over 8 deep.
    """
    if len(data) > MAX_GRAPH_BYTES:
        raise GraphError(f"{where}: {len(data):,} bytes, over {MAX_GRAPH_BYTES:,}")
    model = Message(memoryview(data), _MODEL, f"{where}: model")
    graph = model.view("graph")
    if graph is None:
        raise GraphError(f"{where}: model.graph: missing")
    opsets: dict[str, int] = {}
    for view in model.views("opset_import"):
        opset = Message(view, _OPSET, f"{where}: model.opset_import")
        opsets[opset.text("domain")] = opset.integer("version")
    walk = _Walk(where)
    for feature in ("functions", "training_info"):
        if model.count(feature):
            walk.features.add(feature)
    inputs, outputs, initialized = walk.graph(graph, 0)
    return GraphInfo(
        ir_version=model.integer("ir_version"),
        opsets=opsets,
        inputs={name: value for name, value in inputs.items() if name not in initialized},
        outputs=outputs,
        ops=frozenset(walk.ops),
        external=tuple(walk.external),
        features=frozenset(walk.features),
    )


def check_graph(info: GraphInfo, where: str, *, external: Mapping[str, int]) -> None:
    """Raise `GraphError` for what `graph_problems` finds; call it before making a session."""
    raise_errors(graph_problems(info, where, external=external), where, GraphError)


def graph_problems(info: GraphInfo, where: str, *, external: Mapping[str, int]) -> list[Problem]:
    """Everything about a graph that a package may not contain.

    `external` gives the locations that external data may name, with their sizes in bytes.
    """
    problems: list[Problem] = []
    for feature in sorted(info.features):
        problems.append(problem("graph-forbidden", where, f"has {feature}"))
    for domain in sorted(set(info.opsets) - {"", "ai.onnx", "com.microsoft"}):
        problems.append(problem("graph-forbidden", where, f"imports the domain {domain!r}"))
    for domain, op in sorted(info.ops):
        known = domain in ("", "ai.onnx") and op not in FORBIDDEN_OPS
        if not known and not (domain == "com.microsoft" and op in CONTRIB_OPS):
            name = f"{domain}.{op}" if domain else op
            problems.append(problem("graph-forbidden", where, f"uses the operator {name}"))
    for tensor in info.external:
        place = f"{where}: tensor {tensor.name!r}"
        size = external.get(tensor.location)
        if size is None:
            allowed = " or ".join(sorted(map(repr, external))) or "none"
            problems.append(
                problem(
                    "graph-external",
                    place,
                    f"external data: expected {allowed}, found {tensor.location!r}",
                )
            )
        elif tensor.offset + tensor.length > size:
            problems.append(
                problem(
                    "graph-external",
                    place,
                    f"ends at {tensor.offset + tensor.length}, {tensor.location} has {size} bytes",
                )
            )
    return problems


@dataclass(slots=True)
class _Walk:
    """Collects what is found in a graph and its subgraphs."""

    where: str
    ops: set[tuple[str, str]] = field(default_factory=set)
    external: list[ExternalTensor] = field(default_factory=list)
    features: set[str] = field(default_factory=set)

    def graph(
        self, view: memoryview, depth: int
    ) -> tuple[dict[str, GraphValue], dict[str, GraphValue], set[str]]:
        """(inputs, outputs, names of initializers) of one graph."""
        if depth > MAX_SUBGRAPH_DEPTH:
            raise GraphError(f"{self.where}: subgraphs are nested over {MAX_SUBGRAPH_DEPTH} deep")
        graph = Message(view, _GRAPH, f"{self.where}: graph")
        if graph.count("sparse_initializer"):
            self.features.add("sparse tensors")
        initialized = {self.tensor(item) for item in graph.views("initializer")}
        for node in graph.views("node"):
            self.node(node, depth)
        return self.values(graph, "input"), self.values(graph, "output"), initialized

    def values(self, graph: Message, field_name: str) -> dict[str, GraphValue]:
        values = [_value(view, f"{self.where}: {field_name}") for view in graph.views(field_name)]
        named = {value.name: value for value in values}
        if len(named) != len(values):
            raise GraphError(f"{self.where}: two graph {field_name}s have the same name")
        return named

    def node(self, view: memoryview, depth: int) -> None:
        node = Message(view, _NODE, f"{self.where}: node")
        self.ops.add((node.text("domain"), node.text("op_type")))
        for item in node.views("attribute"):
            attribute = Message(item, _ATTRIBUTE, f"{self.where}: attribute")
            if attribute.count("sparse_tensor") or attribute.count("sparse_tensors"):
                self.features.add("sparse tensors")
            for tensor in (*attribute.views("t"), *attribute.views("tensors")):
                self.tensor(tensor)
            for graph in (*attribute.views("g"), *attribute.views("graphs")):
                self.graph(graph, depth + 1)

    def tensor(self, view: memoryview) -> str:
        """Check one tensor's size, note it if its data is external, and give its name."""
        tensor = Message(view, _TENSOR, f"{self.where}: tensor")
        name = tensor.text("name")
        place = f"{self.where}: tensor {name!r}"
        dims = tensor.integers("dims")
        dtype, itemsize = _ELEMENTS.get(tensor.integer("data_type"), ("other", 0))
        # A negative number is a varint from 2^63 on.
        if any(dim >= 2**63 for dim in dims) or len(dims) > 64 or math.prod(dims) > _MAX_ELEMENTS:
            raise GraphError(f"{place}: the shape {dims[:8]} is not possible")
        needed = math.prod(dims) * itemsize
        raw = tensor.view("raw_data")
        if raw is not None and itemsize and len(raw) != needed:
            raise GraphError(f"{place}: expected {needed} bytes of data, found {len(raw)}")
        if tensor.integer("data_location") or tensor.count("external_data"):
            if not itemsize:
                raise GraphError(f"{place}: external data of this type is not possible")
            self.external.append(_external(tensor, name, dtype, dims, needed, place))
        return name


def _external(
    tensor: Message, name: str, dtype: str, dims: tuple[int, ...], needed: int, place: str
) -> ExternalTensor:
    entries: dict[str, str] = {}
    for view in tensor.views("external_data"):
        entry = Message(view, _ENTRY, f"{place}: external_data")
        key = entry.text("key")
        if key in entries or key not in _EXTERNAL_KEYS:
            raise GraphError(f"{place}: external_data: {key!r} is unknown or stands twice")
        entries[key] = entry.text("value")
    offset = _decimal(entries.get("offset", "0"), f"{place}: offset")
    length = _decimal(entries.get("length", str(needed)), f"{place}: length")
    if length != needed:
        raise GraphError(f"{place}: external data: expected {needed} bytes, found {length}")
    return ExternalTensor(name, dtype, dims, entries.get("location", ""), offset, length)


def _decimal(text: str, place: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise GraphError(f"{place}: expected a number of bytes, found {text[:40]!r}")
    return int(text)


def _value(view: memoryview, where: str) -> GraphValue:
    value = Message(view, _VALUE, where)
    name = value.text("name")
    type_view = value.view("type")
    kind = Message(type_view, _TYPE, f"{where} {name!r}") if type_view is not None else None
    tensor_view = kind.view("tensor_type") if kind is not None else None
    if tensor_view is None:
        return GraphValue(name, "other", None)
    tensor = Message(tensor_view, _TENSOR_TYPE, f"{where} {name!r}")
    dtype, _ = _ELEMENTS.get(tensor.integer("elem_type"), ("other", 0))
    shape_view = tensor.view("shape")
    if shape_view is None:
        return GraphValue(name, dtype, None)
    dims: list[int | str | None] = []
    for item in Message(shape_view, _SHAPE, f"{where} {name!r}").views("dim"):
        dim = Message(item, _DIM, f"{where} {name!r}")
        known = dim.count("dim_value") > 0
        dims.append(dim.integer("dim_value") if known else dim.text("dim_param") or None)
    return GraphValue(name, dtype, tuple(dims))


_MODEL = describe(
    number={"ir_version": 1},
    one={"graph": 7},
    many={"opset_import": 8, "training_info": 20, "functions": 25},
    skip=(2, 3, 4, 5, 6, 14, 26),
)
_OPSET = describe(one={"domain": 1}, number={"version": 2})
_GRAPH = describe(
    many={"node": 1, "initializer": 5, "sparse_initializer": 15, "input": 11, "output": 12},
    skip=(2, 10, 13, 14, 16),
)
_NODE = describe(
    one={"op_type": 4, "domain": 7}, many={"attribute": 5}, skip=(1, 2, 3, 6, 8, 9, 10)
)
_ATTRIBUTE = describe(
    one={"t": 5, "g": 6, "sparse_tensor": 22},
    many={"tensors": 10, "graphs": 11, "sparse_tensors": 23},
    skip=(1, 2, 3, 4, 7, 8, 9, 13, 14, 15, 20, 21),
)
_TENSOR = describe(
    numbers={"dims": 1},
    number={"data_type": 2, "data_location": 14},
    one={"name": 8, "raw_data": 9},
    many={"external_data": 13},
    skip=(3, 4, 5, 6, 7, 10, 11, 12, 16),
)
_ENTRY = describe(one={"key": 1, "value": 2})
_VALUE = describe(one={"name": 1, "type": 2}, skip=(3, 4))
_TYPE = describe(one={"tensor_type": 1}, skip=(4, 5, 6, 7, 8, 9))
_TENSOR_TYPE = describe(number={"elem_type": 1}, one={"shape": 2})
_SHAPE = describe(many={"dim": 1})
_DIM = describe(number={"dim_value": 1}, one={"dim_param": 2}, skip=(3,))
