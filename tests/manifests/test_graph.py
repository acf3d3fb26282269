"""Looking into graphs that the `onnx` package made."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import onnx
import pytest
from evermind_manifests.errors import GraphError
from evermind_manifests.graph import GraphValue, check_graph, graph_problems, inspect_graph
from evermind_manifests.interface import check_graph_interface
from evermind_manifests.manifest import StateSpec
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.conftest import GoldenCase
from tests.manifests.builders import external_tensor, tiny_graphs, tiny_layout, tiny_manifest

FLOAT = TensorProto.FLOAT


def model(
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    opsets: dict[str, int] | None = None,
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["T", 4])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        initializers or [],
    )
    imports = [helper.make_opsetid(domain, v) for domain, v in (opsets or {"": 21}).items()]
    made = helper.make_model(graph, opset_imports=imports, functions=functions or [])
    return bytes(made.SerializeToString())


def subgraph(node: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph([node], "body", [], [])


def nested(depth: int, innermost: onnx.NodeProto) -> onnx.NodeProto:
    node = innermost
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["y"], then_branch=subgraph(node))
    return node


IDENTITY = helper.make_node("Identity", ["x"], ["y"])


def test_what_a_graph_is_made_of() -> None:
    info = inspect_graph(tiny_graphs()["graphs/expert.onnx"], "expert")
    assert info.inputs == {
        "x": GraphValue("x", "f32", ("n", 4)),
        "w1": GraphValue("w1", "f16", (8, 4)),
        "b1": GraphValue("b1", "f32", (8,)),
        "w2": GraphValue("w2", "f16", (4, 8)),
        "b2": GraphValue("b2", "f32", (4,)),
    }
    assert info.outputs == {"y": GraphValue("y", "f32", ("n", 4))}
    assert info.ops == {("", "Cast"), ("", "Gemm"), ("", "Relu")}
    assert info.opsets == {"": 21}
    assert info.ir_version == 10
    assert info.external == ()


def test_external_data() -> None:
    layout = tiny_layout()
    info = inspect_graph(tiny_graphs()["graphs/expert_external.onnx"], "expert")
    assert list(info.inputs) == ["x"]
    assert [(t.name, t.dtype, t.dims, t.location, t.offset, t.length) for t in info.external] == [
        (s.name, s.dtype, s.shape, "expert.bin", s.offset, s.bytes) for s in layout.tensors
    ]
    check_graph(info, "expert", external={"expert.bin": layout.bytes})


def test_an_initializer_is_not_an_input_to_bind() -> None:
    tensor = helper.make_tensor("x", FLOAT, [1], [0.0])
    assert inspect_graph(model([IDENTITY], [tensor]), "g").inputs == {}
    assert inspect_graph(model([IDENTITY]), "g").outputs["y"].dims is None


def test_graphs_by_others(golden: Callable[[str], GoldenCase]) -> None:
    data = golden("export_lm").bytes("model.onnx")
    info = inspect_graph(data, "model.onnx")
    expected = onnx.load_from_string(data)
    assert set(info.outputs) == {value.name for value in expected.graph.output}
    assert {op for _, op in info.ops} == {node.op_type for node in expected.graph.node}
    check_graph(info, "model.onnx", external={})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (model([helper.make_node("Loop", ["x"], ["y"], body=subgraph(IDENTITY))]), "Loop"),
        (model([nested(3, helper.make_node("Loop", [], ["y"]))]), "Loop"),
        (model([helper.make_node("Evil", ["x"], ["y"], domain="evil")]), "operator evil.Evil"),
        (model([IDENTITY], opsets={"": 21, "evil": 1}), "imports the domain 'evil'"),
        (
            model([helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")]),
            "operator com.microsoft.EPContext",
        ),
        (
            model(
                [helper.make_node("F", ["x"], ["y"], domain="")],
                functions=[
                    helper.make_function(
                        "", "F", ["x"], ["y"], [IDENTITY], [helper.make_opsetid("", 21)]
                    )
                ],
            ),
            "has functions",
        ),
        (
            model([helper.make_node("Constant", [], ["y"], sparse_value=onnx.SparseTensorProto())]),
            "has sparse tensors",
        ),
    ],
)
def test_what_a_package_may_not_contain(data: bytes, message: str) -> None:
    info = inspect_graph(data, "g")
    assert any(message in item.message for item in graph_problems(info, "g", external={}))
    with pytest.raises(GraphError, match=message):
        check_graph(info, "g", external={})


def test_what_a_package_may_contain() -> None:
    nodes = [
        nested(2, IDENTITY),
        helper.make_node("Scan", ["x"], ["y"], body=subgraph(IDENTITY), num_scan_inputs=1),
        helper.make_node("MoE", ["x"], ["y"], domain="com.microsoft"),
    ]
    info = inspect_graph(model(nodes, opsets={"": 21, "com.microsoft": 1}), "g")
    assert graph_problems(info, "g", external={}) == []


EXTERNAL = {"weights.bin": 100}


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../weights.bin", "./weights.bin", "weights.bin/", "", "WEIGHTS.BIN"],
)
@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph"])
def test_external_data_elsewhere(location: str, place: str) -> None:
    tensor = external_tensor("w", [4], location, 0, 16)
    constant = helper.make_node("Constant", [], ["y"], value=tensor)
    data = {
        "initializer": model([IDENTITY], [tensor]),
        "constant": model([constant]),
        "subgraph": model([nested(3, constant)]),
    }[place]
    info = inspect_graph(data, "g")
    with pytest.raises(GraphError) as caught:
        check_graph(info, "g", external=EXTERNAL)
    assert f"expected 'weights.bin', found {location!r}" in str(caught.value)
    with pytest.raises(GraphError, match="expected none, found"):
        check_graph(info, "g", external={})


@pytest.mark.parametrize(("offset", "fits"), [(0, True), (84, True), (85, False), (10**15, False)])
def test_external_data_past_the_end(offset: int, fits: bool) -> None:
    info = inspect_graph(
        model([IDENTITY], [external_tensor("w", [4], "weights.bin", offset, 16)]), "g"
    )
    assert (not graph_problems(info, "g", external=EXTERNAL)) == fits


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (external_tensor("w", [4], "weights.bin", 0, 15), "expected 16 bytes, found 15"),
        (external_tensor("w", [4], "weights.bin", -1, 16), "expected a number of bytes"),
        (external_tensor("w", [4], "weights.bin", 10**20, 16), "expected a number of bytes"),
        (external_tensor("w", [-4], "weights.bin", 0, 16), "is not possible"),
        (external_tensor("w", [2**62, 2**62], "weights.bin", 0, 0), "is not possible"),
        (external_tensor("w", [4], "weights.bin", 0, 16, TensorProto.STRING), "not possible"),
        (TensorProto(name="w", data_type=FLOAT, dims=[4], raw_data=b"1234"), "expected 16 bytes"),
        (TensorProto(name="w", data_type=FLOAT, dims=[2**40, 2]), "is not possible"),
    ],
)
def test_tensors_that_cannot_be(tensor: onnx.TensorProto, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        inspect_graph(model([IDENTITY], [tensor]), "g")


def test_ambiguous_external_data() -> None:
    tensor = external_tensor("w", [4], "weights.bin", 0, 16)
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(GraphError, match="'location' is unknown or stands twice"):
        inspect_graph(model([IDENTITY], [tensor]), "g")
    tensor = external_tensor("w", [4], "weights.bin", 0, 16)
    tensor.external_data.add(key="basepath", value="/")
    with pytest.raises(GraphError, match="'basepath' is unknown"):
        inspect_graph(model([IDENTITY], [tensor]), "g")


def test_two_graphs_in_one_file() -> None:
    """Protobuf readers merge a field that stands twice: what one checks, another may not run."""
    with pytest.raises(GraphError, match="stands more than once"):
        inspect_graph(model([IDENTITY]) + model([IDENTITY]), "g")


@pytest.mark.parametrize("depth", [9, 20])
def test_subgraphs_too_deep(depth: int) -> None:
    with pytest.raises(GraphError, match="nested over 8 deep"):
        inspect_graph(model([nested(depth, IDENTITY)]), "g")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a graph",
        b"\x3a\xff\xff\xff\xff\x0f",
        b"\x80" * 12,
        b"\x0b\x0c",
        b"\x3a\x02\xff",
        b"\x18\x01",
        b"\xf8\x7f\x01",
    ],
)
def test_bytes_that_are_no_model(data: bytes) -> None:
    with pytest.raises(GraphError, match=r"^g: "):
        inspect_graph(data, "g")


@given(st.data())
def test_a_damaged_graph_never_crashes(data: st.DataObject) -> None:
    """Cut or changed anywhere, the file is read or refused; nothing else happens."""
    raw = bytearray(data.draw(st.sampled_from(sorted(tiny_graphs().values()))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(1, len(raw))) :]
    try:
        info = inspect_graph(bytes(raw), "g")
    except GraphError:
        return
    for tensor in info.external:
        inside = tensor.location == "expert.bin" and tensor.offset + tensor.length <= 64
        problems = graph_problems(info, "g", external={"expert.bin": 64})
        assert inside or any(repr(tensor.name) in item.place for item in problems)


@pytest.mark.parametrize("path", sorted(tiny_graphs()))
def test_a_graph_that_fits_its_steps(path: str) -> None:
    check_graph_interface(tiny_manifest(), path, inspect_graph(tiny_graphs()[path], path))


@pytest.mark.parametrize(
    ("path", "other", "message"),
    [
        ("graphs/router.onnx", "graphs/head.onnx", r"plan\.prefill\[0\].*no input 'router', 'x'"),
        ("graphs/segment.onnx", "graphs/head.onnx", r"plan\.decode\[1\].*top_k 2 experts"),
        ("graphs/expert.onnx", "graphs/head.onnx", r"kinds\['ffn'\].*no input 'b1', 'b2', 'w1'"),
        ("graphs/head.onnx", "graphs/router.onnx", r"bound to the graph's input 'router', 'x'"),
        ("graphs/head.onnx", "graphs/router.onnx", r"the graph has no output 'next', 'y'"),
    ],
)
def test_a_graph_that_does_not_fit_its_steps(path: str, other: str, message: str) -> None:
    info = inspect_graph(tiny_graphs()[other], path)
    with pytest.raises(GraphError, match=message):
        check_graph_interface(tiny_manifest(), path, info)


def test_a_state_of_another_shape_is_found_in_one_graph() -> None:
    manifest = tiny_manifest()
    state = {"state": StateSpec(dtype="f32", shape=(5,))}
    manifest = msgspec.structs.replace(
        manifest, plan=msgspec.structs.replace(manifest.plan, state=state)
    )
    info = inspect_graph(tiny_graphs()["graphs/head.onnx"], "graphs/head.onnx")
    with pytest.raises(GraphError, match=r"'state': expected f32 \[4\], found f32 \[5\]"):
        check_graph_interface(manifest, "graphs/head.onnx", info)
