"""Buffers: states that a graph fills in place, in a hand-made package without experts.

The graph adds up all rows so far and scatters the new ones behind those of the buffer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_manifests.errors import GraphError, InputError
from evermind_manifests.manifest import GraphStep, Plan, StateSpec, ValueSpec
from evermind_manifests.validate import validate
from evermind_runtime import State
from evermind_runtime.rows import FIRST_ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.runtime.hand_made import (
    append_rows,
    manifest_of,
    problems_after,
    write_package,
    zero_unless_large,
)

D, LIMIT = 3, 300
X = np.random.default_rng(6).normal(size=(LIMIT, D)).astype(np.float32)
WANT = np.cumsum(X.astype(np.float64), axis=0)


def _sums() -> bytes:
    b = GraphBuilder("sums")
    b.output(sums(b, b.input("x", "f32", ["T", D])), "y", "f32", ["T", D])
    return b.build()


def sums(b: GraphBuilder, x: str) -> Any:
    """The sum of all rows up to each; fails where a number is 1000 or more."""
    buffer = b.input("context", "f32", [1, "C", D])
    past = b.input("past", "i64", [1])
    filled = b.op("Slice", buffer, b.const([0]), past, b.const([1]))
    earlier = b.op("ReduceSum", filled, b.const([0, 1]), keepdims=0)
    b.output(append_rows(b, buffer, past, x), "new", "f32", [1, "C", D])
    return b.op("Add", b.op("CumSum", x, b.const(0)), b.op("Add", earlier, zero_unless_large(b, x)))


def plan_of_sums() -> Plan:
    rows = ValueSpec(dtype="f32", shape=("T", D))
    step = GraphStep(
        graph="graphs/sums.onnx",
        inputs={"x": "x", "context": "h", "past": "so_far"},
        outputs={"y": "y", "new": "h"},
    )
    return Plan(
        inputs={"x": rows},
        outputs={"y": rows},
        state={"h": StateSpec(dtype="f32", shape=(1, "C", D), limit=LIMIT, length="so_far")},
        prefill=(step,),
        decode=(step,),
    )


def write(path: Path) -> Path:
    return write_package(path, manifest_of(plan_of_sums()), {"graphs/sums.onnx": _sums()})


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("buffers") / "p")


@pytest.fixture(scope="module")
def model(package: Path) -> Any:
    with em.load(package) as opened:
        yield opened


def rows(state: State) -> int:
    return state.save()["h"].shape[1]


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.tuples(st.integers(0, 90), st.booleans()), max_size=8))
def test_any_division_into_calls_gives_the_same(model: Any, parts: list[tuple[int, bool]]) -> None:
    state, at = model.new_state(), 0
    for count, decode in parts:
        count = min(count, LIMIT - at)
        steps = "decode" if decode else "prefill"
        found = model.forward({"x": X[at : at + count]}, state=state, steps=steps)["y"]
        np.testing.assert_allclose(found, WANT[at : at + count], atol=1e-4)
        at += count
    np.testing.assert_array_equal(state.save()["h"], X[None, :at])


def test_decode_follows_a_buffer_that_moved_while_something_failed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far a call came: it computes on the rows that there are."""
    state = model.new_state()
    for row in range(64):
        model.decode({"x": X[row : row + 1]}, state)
    mark = state.mark()
    state.reserve(1)  # the buffer moves, and then the call fails
    state.rewind(mark)
    for row in range(64, 70):
        found = model.decode({"x": X[row : row + 1]}, state)["y"]
        np.testing.assert_allclose(found, WANT[row : row + 1], atol=1e-4)
    np.testing.assert_array_equal(state.save()["h"], X[None, :70])


def test_nothing_moves_but_to_grow(model: Any) -> None:
    state = model.new_state()
    places: dict[int, set[int]] = {}
    values = []  # kept, so that each has an identity of its own
    for row in range(LIMIT):
        model.decode({"x": X[row : row + 1]}, state)
        value = state.buffers["h"].place.value
        places.setdefault(id(value), set()).add(value.data_ptr())
        values.append(value)
    # 64, 128, 256 rows, the limit
    assert [len(pointers) for pointers in places.values()] == [1] * 4
    assert state.buffers["h"].shape == (1, LIMIT, D)
    np.testing.assert_array_equal(state.save()["h"], X[None])


def test_what_is_saved_has_no_room(model: Any) -> None:
    state = model.new_state()
    model.forward({"x": X[:70]}, state=state)
    saved = state.save()
    assert saved["h"].shape == (1, 70, D)
    other = model.new_state()
    model.forward({"x": X[200:]}, state=other)
    other.restore(saved)
    for one in (state, other, state.copy()):
        found = model.forward({"x": X[70:80]}, state=one, steps="decode")["y"]
        np.testing.assert_allclose(found, WANT[70:80], atol=1e-4)
        assert rows(one) == 80
    assert saved["h"].shape == (1, 70, D)


def test_rows_of_a_batch_have_states_of_their_own(model: Any) -> None:
    states = [model.new_state() for _ in range(3)]
    batch = X[:210].reshape(3, 70, D)
    found = model.forward({"x": batch}, state=states)["y"]
    np.testing.assert_allclose(found, np.cumsum(batch, axis=1), atol=1e-4)
    for state, given_rows in zip(states, batch, strict=True):
        np.testing.assert_array_equal(state.save()["h"], given_rows[None])


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a_failed_call_leaves_the_state_as_before(
    model: Any, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_runtime.model.PREFILL_CHUNK", 20)
    state = model.new_state()
    model.forward({"x": X[:60]}, state=state)
    bad = X[60:130].copy()
    bad[65, 0] = 1e6  # in the last chunk, when the buffer has moved
    with pytest.raises(GraphError):
        model.forward({"x": bad}, state=state, steps=steps)
    np.testing.assert_array_equal(state.save()["h"], X[None, :60])
    found = model.forward({"x": X[60:130]}, state=state, steps=steps)["y"]
    np.testing.assert_allclose(found, WANT[60:130], atol=1e-4)


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_the_limit_is_said_before_anything_changes(model: Any, steps: Any) -> None:
    state = model.new_state()
    model.forward({"x": X[:-2]}, state=state, outputs=[])
    with pytest.raises(InputError, match=f"at most {LIMIT} tokens in all, found 298 and 3"):
        model.forward({"x": X[:3]}, state=state, steps=steps)
    model.forward({"x": X[-2:]}, state=state, steps=steps)
    with pytest.raises(InputError, match="found 300 and 1 more"):
        model.decode({"x": X[:1]}, state)
    np.testing.assert_array_equal(state.save()["h"], X[None])


def test_a_state_that_does_not_fit_is_refused() -> None:
    spec = {"dtype": "f32", "shape": (2, "C", D), "limit": 9, "length": "so_far"}
    plan = _plan({"k": StateSpec(**spec), "v": StateSpec(**spec)})
    state = State(plan)
    good = {name: np.ones((2, 4, D), np.float32) for name in "kv"}
    state.restore(good)
    assert state.lengths["so_far"].tolist() == [4]
    for shape in ((4, 2, D), (2, 4, D + 1), (4, D), (2, 4, D, 1)):
        with pytest.raises(InputError, match=r"'v': expected float32 \(2, C, 3\), found"):
            state.restore({**good, "v": np.ones(shape, np.float32)})
    with pytest.raises(InputError, match="at most 9 rows, found 10"):
        state.restore({**good, "v": np.ones((2, 10, D), np.float32)})
    with pytest.raises(InputError, match="'v': expected 4 rows as 'k' has, found 5"):
        state.restore({**good, "v": np.ones((2, 5, D), np.float32)})
    assert state.save()["v"].shape == (2, 4, D)


def test_room_begins_small_and_never_exceeds_the_limit() -> None:
    large = StateSpec(dtype="f32", shape=("C", D), limit=10**6, length="so_far")
    small = StateSpec(dtype="f32", shape=("C", D), limit=5, length="so_far")
    assert State(_plan({"h": large})).buffers["h"].shape == (FIRST_ROWS, D)
    assert State(_plan({"h": small})).buffers["h"].shape == (5, D)


def _plan(states: dict[str, StateSpec]) -> Plan:
    return Plan(inputs={}, outputs={}, state=states, prefill=(), decode=())


STEP = {"graph": "graphs/sums.onnx", "inputs": {"x": "h"}, "outputs": {"y": "z"}, "step": "graph"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["state"]["h"].update(shape=[1, "C", "D"]), "one name in its shape"),
        (lambda plan: plan["state"]["h"].update(shape=[1, 5, D]), "one name in its shape, not 0"),
        (lambda plan: plan["state"]["h"].update(length="x"), "'x' is an input or a state"),
        (lambda plan: plan["state"]["h"].update(length="h"), "'h' is an input or a state"),
        (lambda plan: plan["state"]["h"].update(length="y"), "'y' is produced twice"),
        (lambda plan: plan["state"]["h"].update(finite="x"), "finite: a buffer cannot"),
        (lambda plan: plan["outputs"]["y"].update(value="h"), "an output of the plan is taken"),
        (lambda plan: plan["decode"][0]["inputs"].update(context="x"), "not read and written once"),
        (lambda plan: plan["prefill"].append(STEP), "not read and written once by one graph step"),
        (lambda plan: plan["decode"][0]["outputs"].update(y="h"), "read and written once"),
    ],
)
def test_structure(package: Path, change: Any, message: str) -> None:
    problems = problems_after(package, lambda raw: change(raw["plan"]))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_bfloat16_between_steps_is_refused(tmp_path: Path, steps: Any) -> None:
    b = GraphBuilder("half")
    b.output(b.op("Cast", b.input("x", "f32", ["T", D]), to=16), "z", "bf16", ["T", D])
    wide = GraphBuilder("wide")
    wide.output(wide.op("Cast", wide.input("z", "bf16", ["T", D]), to=1), "y", "f32", ["T", D])
    there = GraphStep(graph="graphs/half.onnx", inputs={"x": "x"}, outputs={"z": "z"})
    back = GraphStep(graph="graphs/wide.onnx", inputs={"z": "z"}, outputs={"y": "y"})
    plan = replace(plan_of_sums(), state={}, prefill=(there, back), decode=(there, back))
    graphs = {"graphs/half.onnx": b.build(), "graphs/wide.onnx": wide.build()}
    write_package(tmp_path / "p", manifest_of(plan), graphs)
    assert "graph-interface" in {one.code for one in validate(tmp_path / "p", deep=True).problems}
    with em.load(tmp_path / "p") as model, pytest.raises(GraphError, match="'z': expected one of"):
        model.forward({"x": X[:1]}, steps=steps)
