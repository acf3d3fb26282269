"""Cut transformers' exported graph at its experts: one segment before, between and after them.

A segment takes what earlier ones computed from named values of the plan. What depends on
positions and lengths alone (masks, rotations) is computed by the first one, unless its shape varies
with the state's length, which a value between two steps may not: then every segment that needs it
computes it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy.typing as npt
from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import StateSpec

from ..onnx_graph import ONNX_DTYPES, ExternalTensor, external_tensor
from ..reason import reason
from ..resident import Stored
from .guesses import guess_ids, guess_nodes, guess_x
from .half import FLOAT, HALVES, INSIDE, fit_for_cuda, half_values, retyped, with_float_edges
from .nodes import domains, join_reshapes, rename, strip, taken
from .opaque import DOMAIN, OPERATOR
from .states import LOGITS, TOKENS, plan_states, state_out, with_plan_values
from .trunk import Trunk
from .weights import weigh

if TYPE_CHECKING:
    import onnx

# From here on a constant lies in the resident file, not in the graph.
_TABLE_BYTES = 1024
_ORT_TYPES = {
    "tensor(float)": 1,
    "tensor(int32)": 6,
    "tensor(int64)": 7,
    "tensor(bool)": 9,
    "tensor(double)": 11,
}


class ExpertsNode(NamedTuple):
    """Where a layer's experts stand: the names of what they take and give."""

    x: str
    ids: str
    gates: str
    y: str


class Value(NamedTuple):
    """A graph input's or output's type: TensorProto.DataType and dimensions."""

    dtype: int
    dims: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """One graph: its nodes, and the names of what it takes, gives and is weighed with."""

    nodes: list[onnx.NodeProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]


@dataclass(slots=True)
class Cut:
    """The segments, the experts between them, the types of values, and what they are made with.

    `guesses` are graphs by the layer they are about; `weights` the trunk's, those that a graph
    uses; `constants` the exporter's own. `half` has the types of values and weights that are of
    half precision inside of segments; between them (`values`) they are float32, but for buffers.
    """

    segments: list[Segment]
    experts: list[ExpertsNode]
    guesses: dict[int, Segment]
    values: dict[str, Value]
    states: dict[str, StateSpec]
    weights: dict[str, Stored]
    constants: dict[str, npt.NDArray[Any]]
    half: dict[str, int]
    opsets: dict[str, int]
    ir_version: int

    @property
    def tables(self) -> dict[str, npt.NDArray[Any]]:
        """The constants that are stored outside of the graphs."""
        return {
            name: array
            for name, array in self.constants.items()
            if array.ndim and array.nbytes >= _TABLE_BYTES and name not in self.half
        }

    def graph(self, number: int, resident: Mapping[str, ExternalTensor]) -> bytes:
        """One segment's model, its weights in the resident file."""
        return _serialize(self, self.segments[number], resident)

    def guess(self, layer: int, resident: Mapping[str, ExternalTensor]) -> bytes:
        """The model that guesses what a layer's router will choose."""
        return _serialize(self, self.guesses[layer], resident)


def cut_graph(program: Any, trunk: Trunk, limit: int | None) -> Cut:
    """Cut `program` (an `onnx_ir.Model` as `trace` gives it); `limit` is the longest context.

    Its inputs that are weights of `trunk` become those.

    Raises `UnsupportedError` for a graph of another form than the plan can hold.
    """
    import onnx_ir

    graph = program.graph
    if len(program.functions):
        raise UnsupportedError("the exported graph has functions of its own")
    constants = {name: value.const_value.numpy() for name, value in graph.initializers.items()}
    weights = {one.name: trunk.name(one.name) for one in graph.inputs if one.name in trunk.names}
    inputs = {one.name: tuple(one.shape) for one in graph.inputs if one.name not in weights}
    outputs = [one.name for one in graph.outputs]
    nodes = [onnx_ir.to_proto(node) for node in graph]
    half = half_values(graph)
    half |= {own: half[name] for name, own in weights.items() if name in half}
    strip(nodes)
    rename(nodes, weights)
    nodes = fit_for_cuda(nodes, half)
    dtypes = {HALVES[one] for one in half.values()}
    assert len(dtypes) <= 1, "a model is made in one dtype, and what it keeps in float32"
    states = plan_states(inputs, outputs, nodes, limit, *dtypes)
    for name, (past, present) in states.pairs.items():
        half |= {
            own: half[one] for own, one in ((name, past), (state_out(name), present)) if one in half
        }
    shaped = with_plan_values(nodes, states, constants)
    join_reshapes(shaped, constants)
    opsets = {domain: int(one) for domain, one in program.opset_imports.items()}
    opsets.pop(DOMAIN, None)
    opsets.setdefault("com.microsoft", 1)
    given = constants.keys() | weights.values()
    known = _known_dims(graph, inputs["input_ids"][1]) | states.positions
    steady = {name for name, dims in known.items() if dims and None not in dims}
    segments, experts = _split(shaped, [LOGITS, *map(state_out, states.specs)], given, steady)
    stored = trunk.weights
    used = {name for segment in segments for name in segment.constants} - constants.keys()
    cut = Cut(
        segments=segments,
        experts=experts,
        guesses={},
        values={},
        states=states.specs,
        weights={name: stored[name] for name in sorted(used)},
        constants=constants,
        half=half,
        opsets=opsets,
        ir_version=int(program.ir_version),
    )
    cut.values[TOKENS] = Value(7, ("T",))
    for name in states.buffer_lengths:
        cut.values[name] = Value(7, (1,))
    for name, spec in states.specs.items():
        cut.values[name] = Value(ONNX_DTYPES[spec.dtype], spec.shape)
    for number, segment in enumerate(segments):
        cut.values |= _output_types(cut, segment, known)
        if number < len(experts):
            _check_experts(cut, experts[number])
    for layer in range(1, len(experts)):
        _add_guess(cut, layer, shaped, given)
    return cut


def _add_guess(
    cut: Cut, layer: int, nodes: Sequence[onnx.NodeProto], constants: Container[str]
) -> None:
    """Have the layer's router guessed, if it reads what its experts see and nothing else."""
    before, here = cut.experts[layer - 1], cut.experts[layer]
    shown, ids = cut.values[before.x], cut.values[here.ids]
    found = guess_nodes(nodes, layer, here.x, here.ids, constants)
    if not found or shown.dims[1] != cut.values[here.x].dims[1]:
        return
    used = {name for node in found for name in taken(node) if name in constants}
    cut.guesses[layer] = Segment(found, (guess_x(layer),), (guess_ids(layer),), tuple(sorted(used)))
    cut.values[guess_x(layer)] = Value(shown.dtype, (1, shown.dims[1]))
    if here.x in cut.half:
        cut.half[guess_x(layer)] = cut.half[here.x]
    cut.values[guess_ids(layer)] = Value(ids.dtype, (1, ids.dims[1]))


def _split(
    nodes: list[onnx.NodeProto],
    wanted: Sequence[str],
    constants: Container[str],
    steady: Container[str],
) -> tuple[list[Segment], list[ExpertsNode]]:
    """Segments and the experts between them, in order.

    The shapes of `steady` values vary with the tokens of one call alone.
    """
    stages, experts = _stages(nodes)
    varying = _varying(nodes, constants)
    producer = {name: node for node in nodes for name in node.output if name}
    count = len(experts) + 1
    demanded: list[dict[str, None]] = [{} for _ in range(count)]

    def demand(name: str) -> None:
        # What no token's content changes is there from the beginning.
        demanded[stages[name] or 0][name] = None

    for name in wanted:
        demand(name)
    for number, node in enumerate(experts):
        for name in (node.x, node.ids, node.gates):
            stage = stages[name]
            if stage is not None and stage > number:
                raise UnsupportedError(f"experts {number}: {name!r} is of a later layer")
            demanded[number if stage is None else stage][name] = None
    given = {node.y for node in experts}
    segments: list[Segment | None] = [None] * count
    for stage in reversed(range(count)):
        kept: set[int] = set()
        inputs: dict[str, None] = {}
        used: dict[str, None] = {}
        pending = list(demanded[stage])
        while pending:
            name = pending.pop()
            if name in constants:
                used[name] = None
            elif name in given or name not in producer:
                inputs[name] = None
            elif stages[name] not in (None, stage):
                inputs[name] = None
                demand(name)
            elif stage and stages[name] is None and name in steady and name in varying:
                inputs[name] = None
                demanded[0][name] = None
            elif id(producer[name]) not in kept:
                kept.add(id(producer[name]))
                pending += taken(producer[name])
        segments[stage] = Segment(
            nodes=[node for node in nodes if id(node) in kept],
            inputs=tuple(sorted(inputs)),
            outputs=tuple(demanded[stage]),
            constants=tuple(sorted(used)),
        )
    return [one for one in segments if one is not None], experts


def _stages(
    nodes: Sequence[onnx.NodeProto],
) -> tuple[dict[str, int | None], list[ExpertsNode]]:
    """Value → the segment that computes it; None for what no token's content changes.

    That is what depends on lengths, positions and the state alone.
    """
    stages: dict[str, int | None] = {TOKENS: 0}
    experts: list[ExpertsNode] = []
    for node in nodes:
        counts = node.op_type == "Shape" and node.input[0] == TOKENS
        late = [] if counts else [stages.get(name) for name in taken(node)]
        stage = max((one for one in late if one is not None), default=None)
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
            x, ids, gates = node.input
            if stage != len(experts):
                raise UnsupportedError("the exported graph does not run experts one by one")
            experts.append(ExpertsNode(x, ids, gates, node.output[0]))
            stage += 1
        for name in node.output:
            stages[name] = stage
    return stages, experts


def _varying(nodes: Sequence[onnx.NodeProto], constants: Container[str]) -> set[str]:
    """What nodes compute from anything but constants."""
    made = {name for node in nodes for name in node.output}
    found: set[str] = set()
    for node in nodes:
        if any(one in found or (one not in made and one not in constants) for one in taken(node)):
            found.update(node.output)
    return found


def _known_dims(graph: Any, tokens: Any) -> dict[str, tuple[int | str | None, ...]]:
    """The dimensions the exporter knows: numbers, "T" where it is `tokens`, else None."""
    return {
        value.name: tuple(
            dim if isinstance(dim, int) else "T" if dim == tokens else None for dim in value.shape
        )
        for node in graph
        for value in node.outputs
        if value.shape is not None and value.name != LOGITS
    }


def _output_types(
    cut: Cut, segment: Segment, known: Mapping[str, tuple[int | str | None, ...]]
) -> dict[str, Value]:
    """The segment's outputs as ONNX Runtime, which knows its own operators, infers them.

    A dimension that neither it nor the exporter knows is taken for the number of tokens.
    """
    from evermind_runtime import onnx_runtime

    ort = onnx_runtime.require()
    onnx_runtime.start(None)
    # Its CPU provider has kernels for float16, and the types are the same.
    data = retyped(_serialize(cut, segment, None), ONNX_DTYPES["bf16"], ONNX_DTYPES["f16"])
    options = onnx_runtime.session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedError(
            f"ONNX Runtime refuses the exported graph: {reason(error)}"
        ) from error
    found = {}
    for one in session.get_outputs():
        if one.name in map(state_out, cut.states):
            continue
        if one.type not in _ORT_TYPES or one.shape is None:
            raise UnsupportedError(f"{one.name}: a value of type {one.type} between segments")
        inferred = [dim if isinstance(dim, int) else None for dim in one.shape]
        told = known.get(one.name, tuple(inferred))
        if len(told) != len(inferred):  # a rank that ONNX Runtime cannot tell reads as 0
            inferred = [None] * len(told)
        dims = tuple(here or other or "T" for here, other in zip(told, inferred, strict=True))
        found[one.name] = Value(_ORT_TYPES[one.type], dims)
    for name, spec in cut.states.items():
        if state_out(name) in segment.outputs:
            appended = spec.grows and not spec.is_buffer
            shape: tuple[int | str, ...] = ("T", *spec.fixed) if appended else spec.shape
            found[state_out(name)] = Value(ONNX_DTYPES[spec.dtype], shape)
    return found


def _check_experts(cut: Cut, node: ExpertsNode) -> None:
    x, ids, gates = (cut.values[name] for name in (node.x, node.ids, node.gates))
    fits = (
        x.dtype == gates.dtype == 1
        and ids.dtype == 7
        and len(x.dims) == len(ids.dims) == 2
        and isinstance(x.dims[1], int)
        and isinstance(ids.dims[1], int)
        and ids.dims == gates.dims
    )
    if not fits:
        raise UnsupportedError(
            f"experts: expected rows, their experts and gates, found {x}, {ids} and {gates}"
        )
    cut.values[node.y] = Value(1, ("T", x.dims[1]))


def _serialize(cut: Cut, segment: Segment, resident: Mapping[str, ExternalTensor] | None) -> bytes:
    """A segment's model; without `resident` its weights are inputs and outputs have no type."""
    import onnx
    from onnx import helper, numpy_helper

    tables = cut.tables
    inputs = [_info(name, cut.values[name]) for name in segment.inputs]
    nodes = with_float_edges(segment.nodes, segment.inputs, segment.outputs, cut.half)
    initializers = []
    for name in segment.constants:
        if name in cut.weights:
            if resident is None:
                taken_as = cut.half.get(name, FLOAT)
                inputs.append(_info(name, Value(taken_as, cut.weights[name].shape)))
        elif name not in tables:
            initializers.append(numpy_helper.from_array(cut.constants[name], name))
        elif resident is not None:
            initializers.append(external_tensor(name, resident[name]))
        else:
            array = tables[name]
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(_info(name, Value(dtype, array.shape)))
    if resident is not None:
        weights = {name: resident[name] for name in segment.constants if name in cut.weights}
        nodes, weighed = weigh(nodes, weights, cut.half)
        initializers += weighed
    outputs = [
        _info(name, cut.values[name]) if resident is not None else onnx.ValueInfoProto(name=name)
        for name in segment.outputs
    ]
    graph = helper.make_graph(
        nodes, "segment", inputs, outputs, initializers, value_info=_half_info(cut, segment, nodes)
    )
    used = domains(nodes)
    opsets = [
        helper.make_opsetid(domain, version)
        for domain, version in sorted(cut.opsets.items())
        if domain in used or not domain
    ]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=cut.ir_version, producer_name="evermind-pack"
    )
    return bytes(model.SerializeToString(deterministic=True))


def _half_info(
    cut: Cut, segment: Segment, nodes: Sequence[onnx.NodeProto]
) -> list[onnx.ValueInfoProto]:
    """Which values inside are of half precision: whoever loads the graph checks that."""
    from onnx import helper

    edges = {*segment.inputs, *segment.outputs}
    return [
        helper.make_tensor_value_info(name, cut.half[own], None)
        for node in nodes
        for name in node.output
        if name not in edges and (own := name.removesuffix(INSIDE)) in cut.half
    ]


def _info(name: str, value: Value) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, value.dtype, list(value.dims))
