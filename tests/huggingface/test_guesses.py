"""Guesses of an imported model's routers, and what only its first segment computes."""

from __future__ import annotations

from collections.abc import Callable

import evermind_runtime
import numpy as np
import onnx
import pytest
from evermind_exporters.huggingface.guesses import guess_ids, guess_nodes, guess_x
from evermind_exporters.huggingface.nodes import join_reshapes
from evermind_manifests.manifest import GraphStep
from evermind_manifests.package import open_package
from onnx import helper

from .conftest import Imported


@pytest.mark.parametrize("architecture", ["olmoe", "qwen3_moe"])
def test_a_guess_is_the_layers_own_router(
    imported: Callable[[str], Imported], architecture: str
) -> None:
    with evermind_runtime.load(imported(architecture).package) as model:
        plan = model.manifest.plan
        fused = {
            step.experts.layer: step
            for step in plan.decode
            if isinstance(step, GraphStep) and step.experts
        }
        assert [guess.layer for guess in plan.guesses] == sorted(fused)[1:]
        state = model.new_state()
        for token in (5, 17, 80, 3):
            model.decode({"tokens": np.array([token])}, state)
            values = state.bindings._values
            for guess in plan.guesses:
                step = fused[guess.layer]
                ((name, read),) = guess.inputs.items()
                assert read == fused[guess.layer - 1].inputs["x"]
                session = model._engine.sessions.get(guess.graph)
                # Shown what the layer's own experts see it names what they are.
                (ids,) = session.run([guess.ids], {name: values[step.inputs["x"]]})
                assert step.experts
                np.testing.assert_array_equal(ids, values[step.experts.ids])


def test_positions_are_computed_once(imported: Callable[[str], Imported]) -> None:
    with open_package(imported("olmoe").package) as package:
        steps = [one for one in package.manifest.plan.prefill if isinstance(one, GraphStep)]
        graphs = [onnx.load_model_from_string(package.read_file(one.graph)) for one in steps]
    operators = [{node.op_type for node in graph.graph.node} for graph in graphs]
    assert {"Cos", "Range"} <= operators[0]
    assert not any({"Cos", "Range"} & one for one in operators[1:])


def test_a_router_that_reads_more_is_not_guessed() -> None:
    nodes = [
        helper.make_node("Reshape", ["normed", "shape"], ["x"]),
        helper.make_node("MatMul", ["normed", "weight"], ["scores"]),
        helper.make_node("Add", ["scores", "more"], ["sum"]),
        helper.make_node("TopK", ["sum", "k"], ["best", "ids"]),
    ]
    constants = {"shape", "weight", "k"}
    assert guess_nodes(nodes, 1, "x", "ids", constants) == []
    found = guess_nodes(nodes, 1, "x", "ids", constants | {"more"})
    assert [node.op_type for node in found] == ["MatMul", "Add", "TopK"]
    assert found[0].input[0] == guess_x(1)
    assert found[2].output[1] == guess_ids(1)
    assert nodes[1].input[0] == "normed"


def test_a_reshape_of_a_reshape_is_one_unless_it_copies_a_dimension() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "any"], ["a"]),
        helper.make_node("Reshape", ["a", "fixed"], ["b"]),
        helper.make_node("Reshape", ["b", "copying"], ["c"]),
        helper.make_node("Reshape", ["c", "unknown"], ["d"]),
        helper.make_node("Reshape", ["d", "fixed"], ["e"]),
    ]
    constants = {"fixed": np.array([2, -1]), "copying": np.array([0, -1]), "any": np.array([-1])}
    join_reshapes(nodes, constants)
    assert [node.input[0] for node in nodes] == ["x", "x", "b", "c", "c"]
