"""States that grow, experts that read them, and gates of zero: the plan's vocabulary.

A hand-made package: one layer of experts that see the whole sequence, whose earlier rows are a
state; a router that leaves most experts out with a gate of zero. And one without experts, whose
decode program is bound in advance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import (
    ExpertsStep,
    GraphStep,
    Layer,
    Manifest,
    Plan,
    StateSpec,
    ValueSpec,
)
from evermind_manifests.shard import plan_shard
from evermind_manifests.validate import validate
from evermind_runtime.trace import read_trace

from tests.runtime.hand_made import kind_of, manifest_of, problems_after, write_package

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

D, E, K, LIMIT = 4, 3, 2, 700
RNG = np.random.default_rng(5)
EXPERTS = RNG.normal(size=(E, D, D)).astype(np.float32)
X = RNG.normal(size=(23, D)).astype(np.float32)


def _router() -> bytes:
    """The K largest relu(x_e) choose expert e and are its gate; the rows go into the state."""
    b = GraphBuilder("router")
    x = b.input("x", "f32", ["T", D])
    scores = b.op("Relu", b.op("Slice", x, b.const([0]), b.const([E]), b.const([1])))
    gates, ids = b.op("TopK", scores, b.const([K]), outputs=2, axis=-1)
    b.output(ids, "ids", "i64", ["T", K])
    b.output(gates, "gates", "f32", ["T", K])
    b.output(x, "rows", "f32", ["T", D])
    return b.build()


def _sum_so_far(b: GraphBuilder, x: str) -> str:
    earlier = b.op("ReduceSum", b.input("context", "f32", ["C", D]), b.const([0]), keepdims=1)
    return str(b.op("Add", b.op("CumSum", x, b.const(0)), earlier))


def _expert() -> bytes:
    b = GraphBuilder("expert")
    x = b.input("x", "f32", ["T", D])
    w = b.input("w", "f32", [D, D])
    b.output(b.op("MatMul", _sum_so_far(b, x), w), "y", "f32", ["T", D])
    return b.build()


def _history() -> bytes:
    b = GraphBuilder("history")
    x = b.input("x", "f32", ["T", D])
    b.output(_sum_so_far(b, x), "y", "f32", ["T", D])
    b.output(x, "rows", "f32", ["T", D])
    return b.build()


def _manifest(experts: bool, layout: Any) -> Manifest:
    rows = ValueSpec(dtype="f32", shape=("T", D))
    if experts:
        steps: tuple[Any, ...] = (
            GraphStep(
                graph="graphs/router.onnx",
                inputs={"x": "x"},
                outputs={"ids": "ids.0", "gates": "gates.0", "rows": "h"},
            ),
            ExpertsStep(
                layer=0, x="x", ids="ids.0", gates="gates.0", y="y", inputs={"context": "h"}
            ),
        )
    else:
        graph = {"graph": "graphs/history.onnx", "outputs": {"y": "y", "rows": "h"}}
        steps = (GraphStep(inputs={"x": "x", "context": "h"}, **graph),)
    plan = Plan(
        inputs={"x": rows},
        outputs={"y": rows, "rows": ValueSpec(dtype="f32", shape=("T", D), value="h")},
        state={"h": StateSpec(dtype="f32", shape=("C", D), limit=LIMIT)},
        prefill=steps,
        decode=steps,
    )
    if not experts:
        return manifest_of(plan)
    kind = kind_of(layout, "graphs/expert.onnx", scope="sequence")
    layer = Layer(layer=0, kind="sum", experts=E, top_k=K)
    return manifest_of(plan, kinds={"sum": kind}, layers=(layer,))


def write(path: Path, *, experts: bool = True) -> Path:
    layout = plan_shard("sum", "none", [("w", "f32", (D, D))])
    manifest = _manifest(experts, layout)
    if not experts:
        return write_package(path, manifest, {"graphs/history.onnx": _history()})
    graphs = {"graphs/router.onnx": _router(), "graphs/expert.onnx": _expert()}
    shards = [((0, expert), layout, {"w": EXPERTS[expert]}) for expert in range(E)]
    return write_package(path, manifest, graphs, shards)


def expected(x: np.ndarray, *, experts: bool) -> np.ndarray:
    seen = np.cumsum(x.astype(np.float64), axis=0)
    if not experts:
        return seen
    gates = np.maximum(x[:, :E], 0)
    gates[gates < np.sort(gates, axis=1)[:, [E - K]]] = 0
    return np.einsum("te,eij,ti->tj", gates, EXPERTS, seen)


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a_grown_state_is_the_whole_past(tmp_path: Path, experts: bool, steps: Any) -> None:
    want = expected(X, experts=experts)
    with em.load(write(tmp_path / "p", experts=experts)) as model:
        state = model.new_state()
        parts = [
            model.forward({"x": part}, state=state, steps=steps)
            for part in (X[:1], X[1:9], X[9:9], X[9:])
        ]
        assert state.save()["h"].shape == X.shape
        found = np.concatenate([part["y"] for part in parts])
        np.testing.assert_allclose(found, want, atol=1e-4)
        np.testing.assert_array_equal(np.concatenate([part["rows"] for part in parts]), X)


@pytest.mark.parametrize("experts", [True, False])
def test_chunks_programs_and_copies_agree(
    tmp_path: Path, experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_runtime.model.PREFILL_CHUNK", 5)
    want = expected(X, experts=experts)
    with em.load(write(tmp_path / "p", experts=experts)) as model:
        state = model.new_state()
        model.forward({"x": X[:12]}, state=state, outputs=[])
        saved = model.new_state()
        saved.restore(state.save())
        for one in (state, state.copy(), saved):
            y = model.forward({"x": X[12:]}, state=one, steps="decode")["y"]
            np.testing.assert_allclose(y, want[12:], atol=1e-4)
            assert one.save()["h"].shape == X.shape
        # A fresh state knows nothing of the others.
        np.testing.assert_allclose(model.forward({"x": X})["y"], want, atol=1e-4)


@pytest.mark.parametrize("steps", ["prefill", "decode"])
@pytest.mark.parametrize("experts", [True, False])
def test_the_limit_is_said_before_anything_changes(
    tmp_path: Path, experts: bool, steps: Any
) -> None:
    with em.load(write(tmp_path / "p", experts=experts)) as model:
        state = model.new_state()
        model.forward({"x": np.ones((LIMIT - 2, D), np.float32)}, state=state, outputs=[])
        with pytest.raises(InputError, match=f"at most {LIMIT} tokens in all, found 698 and 3"):
            model.forward({"x": X[:3]}, state=state, steps=steps)
        assert len(state.save()["h"]) == LIMIT - 2
        model.forward({"x": X[:2]}, state=state, steps=steps)
        assert len(state.save()["h"]) == LIMIT
        with pytest.raises(InputError, match="found 700 and 1 more"):
            model.decode({"x": X[:1]}, state)


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with em.load(write(tmp_path / "p")) as model:
        state = model.new_state()
        model.forward({"x": X}, state=state, outputs=[])
        for shape in ((2, D + 1), (D,), (2, D, 1)):
            with pytest.raises(InputError, match=r"expected float32 \(C, 4\), found"):
                state.restore({"h": np.zeros(shape, np.float32)})
        with pytest.raises(InputError, match="at most 700 rows, found 701"):
            state.restore({"h": np.zeros((LIMIT + 1, D), np.float32)})
        np.testing.assert_array_equal(state.save()["h"], X)


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a_gate_of_zero_reads_nothing(tmp_path: Path, steps: Any) -> None:
    x = np.abs(X[:6]) * np.array([0, -1, 0, 1], np.float32)
    x[3, 2] = 1.0
    with em.load(write(tmp_path / "p")) as model:
        model.trace(tmp_path / "t.jsonl")
        y = model.forward({"x": x[:3]}, steps=steps)["y"]
        assert not y.any()
        assert model.stats().expert_hits + model.stats().expert_misses == 0
        y = model.forward({"x": x}, steps=steps)["y"]
        np.testing.assert_allclose(y, expected(x, experts=True), atol=1e-4)
        assert model.stats().expert_misses == 1
        assert model.stats().expert_hits == 0
    rows = [row for step in read_trace(tmp_path / "t.jsonl").steps for row in step.tokens]
    assert rows == [(), (), (), (), (), (), (2,), (), ()]


def test_paged_and_unpaged_give_the_same_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "p")
    found = []
    for budget in ("67%", "100%"):
        with em.load(path, budget=budget) as model:
            state = model.new_state()
            first = model.forward({"x": X[:11]}, state=state)["y"]
            then = model.forward({"x": X[11:]}, state=state, steps="decode")["y"]
            found.append(np.concatenate([first, then]))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["plan"]["state"]["h"].update(shape=[D, "C"]), "only the first dimension"),
        (lambda raw: raw["plan"]["state"]["h"].update(shape=["B", "C"]), "only the first"),
        (lambda raw: raw["plan"]["state"]["h"].update(shape=[D]), "neither grows nor counts"),
        (lambda raw: raw["plan"]["state"]["h"].update(limit=2**31 - 1, shape=["C", 999]), "bytes"),
        (lambda raw: raw["kinds"]["sum"].pop("scope"), "inputs: the experts do not see all"),
        (
            lambda raw: raw["plan"]["decode"][1]["inputs"].update(context="nowhere"),
            "'nowhere' is read before",
        ),
    ],
)
def test_structure(tmp_path: Path, change: Any, message: str) -> None:
    problems = problems_after(write(tmp_path / "p"), change)
    assert any(message in problem for problem in problems), problems


def test_inputs_must_be_those_of_the_graph(tmp_path: Path) -> None:
    path = write(tmp_path / "p")
    report = validate(path, deep=True)
    assert report.ok, report
    raw = json.loads((path / "manifest.json").read_bytes())
    for program in ("prefill", "decode"):
        raw["plan"][program][1]["inputs"] = {"past": "h"}
    (path / "manifest.json").write_text(json.dumps(raw))
    report = validate(path, deep=True)
    text = str([problem.message for problem in report.problems])
    assert "no input 'past'" in text
    assert "nothing is bound to the graph's input 'context'" in text
