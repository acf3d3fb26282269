"""Buffers with a window: states that forget what no later row needs, in hand-made packages.

The graph adds up, for every row, the last rows of its window, from those that the runtime kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_manifests.errors import GraphError, InputError
from evermind_manifests.manifest import GraphStep, Plan, StateSpec, ValueSpec
from evermind_runtime import State
from evermind_runtime.rows import FIRST_ROWS, Rows, spare_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.hand_made import (
    append_rows,
    manifest_of,
    problems_after,
    write_package,
    zero_unless_large,
)

D, LIMIT = 3, 900
WINDOWS = (1, 2, 9, 200)
# Integers, so that sums in any order are the same bits.
X = np.random.default_rng(6).integers(-99, 99, size=(LIMIT, D)).astype(np.float32)


def want(window: int) -> np.ndarray:
    return np.stack([X[max(0, at + 1 - window) : at + 1].sum(axis=0) for at in range(LIMIT)])


def _sums(window: int) -> bytes:
    """y = the sum of the last rows up to each; fails where a number is 1000 or more."""
    b = GraphBuilder("sums")
    x = b.input("x", "f32", ["T", D])
    buffer = b.input("context", "f32", [1, "C", D])
    past = b.input("past", "i64", [1])
    so_far = b.input("so_far", "i64", [1])
    count = b.op("Shape", x, start=0, end=1)
    b.output(b.op("Add", so_far, count), "new_so_far", "i64", [1])
    b.output(append_rows(b, buffer, past, x), "new", "f32", [1, "C", D])
    filled = b.op("Squeeze", b.op("Slice", buffer, b.const([0]), past, b.const([1])), b.const([0]))
    before = b.const(np.zeros((window, D)), np.float32)
    sums = b.op("CumSum", b.op("Concat", before, filled, x, axis=0), b.const(0))
    ends = b.op("Slice", sums, b.op("Add", past, b.const([window])), b.const([2**40]))
    begins = b.op("Slice", sums, past, b.op("Add", past, count))
    b.output(b.op("Add", b.op("Sub", ends, begins), zero_unless_large(b, x)), "y", "f32", ["T", D])
    return b.build()


def write(path: Path, window: int) -> Path:
    rows = ValueSpec(dtype="f32", shape=("T", D))
    step = GraphStep(
        graph="graphs/sums.onnx",
        inputs={"x": "x", "context": "h", "past": "rows", "so_far": "n"},
        outputs={"y": "y", "new": "h", "new_so_far": "n"},
    )
    plan = Plan(
        inputs={"x": rows},
        outputs={"y": rows},
        state={
            "h": StateSpec(dtype="f32", shape=(1, "C", D), length="rows", window=window),
            "n": StateSpec(dtype="i64", shape=(1,), limit=LIMIT),
        },
        prefill=(step,),
        decode=(step,),
    )
    return write_package(path, manifest_of(plan), {"graphs/sums.onnx": _sums(window)})


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("windows") / "p", 9)


@pytest.fixture(scope="module", params=WINDOWS)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(window, model)"""
    path = write(tmp_path_factory.mktemp("windows") / "p", request.param)
    with em.load(path) as model:
        yield request.param, model


def room(state: State) -> int:
    return int(state.buffers["h"].shape[1])


def tokens(state: State) -> int:
    return int(state.current["n"][0])


ACTIONS = st.one_of(
    st.tuples(st.just("prefill"), st.integers(0, 300)),
    st.tuples(st.just("decode"), st.integers(0, 80)),
    st.tuples(st.sampled_from(["mark", "rewind", "save", "restore", "copy"]), st.just(0)),
)


@settings(max_examples=30, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=12))
def test_whatever_is_done_a_row_sees_its_window(case: Any, actions: list[tuple[str, int]]) -> None:
    window, model = case
    expected, state, at = want(window), model.new_state(), 0
    mark, marked = state.mark(), 0
    saved, kept = state.save(), 0
    for action, count in actions:
        if action == "mark":
            mark, marked = state.mark(), at
        elif action == "rewind":
            state.rewind(mark)
            at = marked
        elif action == "save":
            saved, kept = state.save(), at
        elif action == "restore":
            state = model.new_state()  # what came after the mark is no longer there
            state.restore(saved)
            at = kept
            mark, marked = state.mark(), at
        elif action == "copy":
            state = state.copy()
            mark, marked = state.mark(), at
        else:
            end = min(at + count, LIMIT)
            found = model.forward({"x": X[at:end]}, state=state, steps=action)["y"]
            np.testing.assert_array_equal(found, expected[at:end])
            at = end
        assert tokens(state) == at
        rows = state.save()["h"]
        assert rows.shape[1] >= min(at, window - 1)
        np.testing.assert_array_equal(rows, X[None, at - rows.shape[1] : at])


def test_memory_stops_growing(case: Any) -> None:
    window, model = case
    state = model.new_state()
    most = window - 1 + spare_rows(window)
    model.forward({"x": X[:600]}, state=state)  # two chunks
    assert room(state) <= max(most, window - 1 + 512) + 1
    places = set()
    for row in range(600, LIMIT):
        model.decode({"x": X[row : row + 1]}, state)
        assert room(state) <= 2 * (most + 1)
        places.add(room(state))
    assert len(places) <= 2  # what the prompt needed, and what a token does


def test_decoding_alone_needs_no_more_than_the_window_and_what_is_spare(case: Any) -> None:
    window, model = case
    state, rooms = model.new_state(), set()
    for row in range(LIMIT):
        model.decode({"x": X[row : row + 1]}, state)
        rooms.add(room(state))
    assert max(rooms) <= window + spare_rows(window)


def test_rows_move_when_the_same_number_is_filled_whatever_came_before(package: Path) -> None:
    """A state that was saved goes on with the same rows in the same places."""
    with em.load(package) as model:
        state = model.new_state()
        model.forward({"x": X[:500]}, state=state)
        twin, copy = model.new_state(), state.copy()
        twin.restore(state.save())
        for row in range(500, 700):
            for one in (state, twin, copy):
                model.decode({"x": X[row : row + 1]}, one)
            counts = {one.buffers["h"].count for one in (state, twin, copy)}
            assert len(counts) == 1


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a_failed_call_leaves_the_state_as_before(
    package: Path, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_runtime.model.PREFILL_CHUNK", 20)
    expected = want(9)
    with em.load(package) as model:
        state = model.new_state()
        model.forward({"x": X[:60]}, state=state)
        bad = X[60:330].copy()
        bad[265, 0] = 1e6  # in the last chunk, when all that was there has been forgotten
        with pytest.raises(GraphError):
            model.forward({"x": bad}, state=state, steps=steps)
        np.testing.assert_array_equal(state.save()["h"], X[None, :60])
        assert tokens(state) == 60
        found = model.forward({"x": X[60:330]}, state=state, steps=steps)["y"]
        np.testing.assert_array_equal(found, expected[60:330])


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("begun", range(1, 9))
def test_a_move_that_is_broken_off_goes_on(
    monkeypatch: pytest.MonkeyPatch, begun: int, marked: bool
) -> None:
    """Ctrl-C at any place of a move in pieces, once and again."""
    window = 500
    kept, most = window - 1, window - 1 + spare_rows(window)
    rows = Rows(StateSpec(dtype="f32", shape=("C", 1), length="rows", window=window))
    numbers = np.arange(most + 1, dtype=np.float32)[:, None]
    rows.fill(rows.write(numbers))
    mark = rows.mark() if marked else None
    original, calls = Rows._span, 0

    def broken(self: Rows, begin: int, end: int) -> Any:
        nonlocal calls
        calls += 1
        if calls in (begun, begun + 3):
            raise KeyboardInterrupt
        return original(self, begin, end)

    monkeypatch.setattr(Rows, "_span", broken)
    for _ in range(4):
        try:
            rows.reserve(1)
            break
        except KeyboardInterrupt:
            continue
    monkeypatch.undo()
    assert rows.count == kept
    np.testing.assert_array_equal(rows.view(), numbers[-kept:])
    if mark:
        rows.rewind(mark)
        np.testing.assert_array_equal(rows.view(), numbers)


def test_what_a_mark_refers_to_is_left_alone_until_it_is_gone() -> None:
    rows = Rows(StateSpec(dtype="f32", shape=("C", 1), length="rows", window=2))
    numbers = np.arange(1000, dtype=np.float32)[:, None]
    rows.fill(rows.write(numbers[:10]))
    mark = rows.mark()
    for _ in range(2):
        for number in range(10, 1000):
            rows.fill(rows.write(numbers[number : number + 1]))
            assert rows.view()[-1] == number
        rows.rewind(mark)
        np.testing.assert_array_equal(rows.view(), numbers[:10])


@pytest.mark.parametrize("at", ["fill", "_tell"])
@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a_token_is_taken_over_whole_or_not_at_all(
    package: Path, monkeypatch: pytest.MonkeyPatch, steps: Any, at: str
) -> None:
    """Ctrl-C after a buffer's rows count, or before: the counter of tokens agrees with them."""
    owner, interrupts = (Rows if at == "fill" else State), [KeyboardInterrupt()]
    original = getattr(owner, at)

    def broken(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if interrupts and sys._getframe(1).f_code.co_name == "_commit":
            raise interrupts.pop()

    with em.load(package) as model:
        state = model.new_state()
        model.forward({"x": X[:30]}, state=state)
        monkeypatch.setattr(owner, at, broken)
        with pytest.raises(KeyboardInterrupt):
            model.forward({"x": X[30:31]}, state=state, steps=steps)
        monkeypatch.undo()
        assert not interrupts
        done = int(state.save()["n"][0])
        assert done in (30, 31)
        state.restore(state.save())
        found = model.forward({"x": X[done : done + 20]}, state=state, steps=steps)["y"]
    np.testing.assert_array_equal(found, want(9)[done : done + 20])


def test_the_limit_is_said_before_anything_changes(package: Path) -> None:
    with em.load(package) as model:
        state = model.new_state()
        model.forward({"x": X[:-2]}, state=state, outputs=[])
        for steps in ("prefill", "decode"):
            with pytest.raises(InputError, match=f"'n': expected at most {LIMIT} tokens in all"):
                model.forward({"x": X[:3]}, state=state, steps=steps)
        model.forward({"x": X[-2:]}, state=state)
        with pytest.raises(InputError, match="found 900 and 1 more"):
            model.decode({"x": X[:1]}, state)


@pytest.mark.parametrize(
    ("count", "rows", "message"),
    [
        (901, 8, "'n': expected 0 to 900 tokens, found 901"),
        (-1, 0, "'n': expected 0 to 900 tokens, found -1"),
        (100, 7, "'h': expected 8 to 100 rows of 100 tokens, found 7"),
        (5, 4, "'h': expected 5 to 5 rows of 5 tokens, found 4"),
        (5, 6, "'h': expected 5 to 5 rows of 5 tokens, found 6"),
    ],
)
def test_a_state_without_what_a_window_needs_is_refused(
    package: Path, count: int, rows: int, message: str
) -> None:
    with em.load(package) as model:
        state = model.new_state()
        model.forward({"x": X[:20]}, state=state)
        arrays = {"n": np.array([count]), "h": np.zeros((1, rows, D), np.float32)}
        with pytest.raises(InputError, match=message):
            state.restore(arrays)
        assert tokens(state) == 20


def test_room_begins_small() -> None:
    for window in (1, 10_000):
        spec = StateSpec(dtype="f32", shape=("C", D), length="rows", window=window)
        assert Rows(spec).shape == (FIRST_ROWS, D)


def _more_states(plan: Any) -> None:
    plan["state"]["k"] = {**plan["state"]["h"], "window": 5}
    for program in ("prefill", "decode"):
        plan[program][0]["inputs"]["k"] = plan[program][0]["outputs"]["k"] = "k"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["state"]["h"].update(limit=9), "a buffer with a window has none"),
        (lambda plan: plan["state"]["n"].update(window=9), "window: this state is no buffer"),
        (lambda plan: plan["state"]["n"].update(shape=[2]), "neither grows nor counts"),
        (lambda plan: plan["state"]["n"].update(dtype="f32"), "neither grows nor counts"),
        (lambda plan: plan["state"]["h"].update(window=2**31 - 1, shape=[1, "C", 99]), "bytes"),
        (_more_states, "buffers of other windows have it"),
    ],
)
def test_structure(package: Path, change: Callable[[Any], None], message: str) -> None:
    problems = problems_after(package, lambda raw: change(raw["plan"]))
    assert any(message in problem for problem in problems), problems
