"""What a caller may get wrong between calls, and what must hold whatever a package does."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_manifests.errors import BudgetError, ClosedError, GraphError, InputError
from evermind_manifests.manifest import (
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Layer,
    Plan,
    StateSpec,
    Step,
    ValueSpec,
)
from evermind_manifests.shard import plan_shard
from evermind_runtime import devices

from tests.packages import LM_CONFIG, export, random_source
from tests.runtime.hand_made import kind_of, manifest_of, write_package

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")


def test_no_tokens_give_no_rows_and_leave_the_state(lm_package: Path) -> None:
    with em.load(lm_package) as model:
        for tokens in ([], np.zeros(0, dtype=np.int64)):
            for steps in ("prefill", "decode"):
                state = model.new_state()
                outputs = model.forward({"tokens": tokens}, state=state, steps=steps)  # type: ignore[arg-type]
                assert outputs["logits"].shape == (0, LM_CONFIG["vocabSize"])
                assert outputs["ids.0"].dtype == np.int64
                assert not state.current["conv.0"].any()
        with pytest.raises(InputError):
            model.forward({"tokens": np.zeros((0, 3), dtype=np.int64)})


def test_a_state_serves_any_model_of_its_package_and_no_other(
    lm_package: Path, tmp_path: Path
) -> None:
    other_weights = export(random_source("evermind-lm", LM_CONFIG, seed=9), tmp_path / "other")
    config = LM_CONFIG | {"convKernel": 5}
    other_plan = export(random_source("evermind-lm", config), tmp_path / "deeper")
    tokens = {"tokens": [1, 2, 3]}
    with em.load(lm_package) as one, em.load(other_weights) as two, em.load(other_plan) as three:
        state, fresh = one.new_state(), two.new_state()
        one.forward(tokens, state=state, steps="decode")
        fresh.restore(state.save())
        # Bound to the first model, the state must not run that model's weights in the second.
        expected = two.forward(tokens, state=fresh, steps="decode")["logits"]
        assert np.array_equal(two.forward(tokens, state=state, steps="decode")["logits"], expected)
        with pytest.raises(InputError, match="one of another"):
            three.forward(tokens, state=state)
        with pytest.raises(InputError, match="expected a State"):
            three.generate([1], state="x")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="different ones"):
            one.forward({"tokens": [[1], [2]]}, state=[state, state])


def test_a_closed_model_says_so(lm_package: Path) -> None:
    model = em.load(lm_package)
    pieces = model.generate([1], max_new_tokens=5)
    next(pieces)
    model.close()
    model.close()
    with pytest.raises(ClosedError, match="closed"):
        model.forward({"tokens": [1]})
    with pytest.raises(ClosedError):
        model.generate([1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify": "sometimes"}, "verify: expected one of"),
        ({"policy": "psychic"}, "policy: expected one of"),
    ],
)
def test_options_that_do_not_exist_are_refused(
    lm_package: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        em.load(lm_package, **arguments)


def test_steps_and_temperatures_that_do_not_exist_are_refused(lm_package: Path) -> None:
    with em.load(lm_package) as model:
        with pytest.raises(InputError, match="steps: expected one of"):
            model.forward({"tokens": [1]}, steps="sideways")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="NaN"):
            model.generate([1], temperature=float("nan"))


# A hand-made package: layers whose experts differ in size, a state, and a router that can be
# told to misbehave: `x[0]` is the first expert it picks, `x[1]` the second.

D = 4
WIDTHS = (4, 64, 16)


def _router(b: GraphBuilder, x: str) -> str:
    """ids (1, 2): the first two features of x, as they are."""
    picked = b.op("Slice", x, b.const([0]), b.const([2]), b.const([1]))
    return str(b.cast(b.op("Round", picked), "i64"))


def _segment(layer: int) -> bytes:
    b = GraphBuilder(f"segment_{layer}")
    x = b.input("x", "f32", [1, D])
    if layer > 0:
        width = WIDTHS[layer - 1]
        base = x
        for i in range(2):
            up = b.input(f"expert{i}.up", "f32", [D, width])
            down = b.input(f"expert{i}.down", "f32", [width, D])
            base = b.op("Add", base, b.op("MatMul", b.op("MatMul", x, up), down))
        b.output(base, "y", "f32", [1, D])
    if layer < len(WIDTHS):
        b.output(_router(b, x), "ids", "i64", [1, 2])
    return b.build()


def _kind_graph(width: int) -> bytes:
    b = GraphBuilder("expert")
    x = b.input("x", "f32", ["rows", D])
    up, down = b.input("up", "f32", [D, width]), b.input("down", "f32", [width, D])
    b.output(b.op("MatMul", b.op("MatMul", x, up), down), "y", "f32", ["rows", D])
    return b.build()


def _counter() -> bytes:
    """count_out = count + 1, and what a later step sees of both names."""
    b = GraphBuilder("counter")
    count = b.input("count", "f32", [1])
    b.output(b.op("Add", count, b.const([1.0], np.float32)), "count_out", "f32", [1])
    return b.build()


def _echo() -> bytes:
    b = GraphBuilder("echo")
    b.output(b.input("count", "f32", [1]), "seen", "f32", [1])
    return b.build()


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Three layers of four experts, of 4, 64 and 16 hidden features."""
    rng = np.random.default_rng(3)
    layouts = [
        plan_shard(f"w{width}", "none", [("up", "f32", (D, width)), ("down", "f32", (width, D))])
        for width in WIDTHS
    ]
    counting: list[Step] = [
        GraphStep(
            graph="graphs/counter.onnx",
            inputs={"count": "count"},
            outputs={"count_out": "count"},
        ),
        GraphStep(graph="graphs/echo.onnx", inputs={"count": "count"}, outputs={"seen": "seen"}),
    ]
    decode: list[Step] = []
    prefill: list[Step] = []
    for layer in range(len(WIDTHS) + 1):
        value = "x" if layer < 2 else f"y.{layer - 2}"
        outputs = {"ids": f"ids.{layer}"} if layer < len(WIDTHS) else {}
        if layer > 0:
            outputs["y"] = f"y.{layer - 1}"
        fused = FusedExperts(layer=layer - 1, ids=f"ids.{layer - 1}") if layer else None
        decode.append(
            GraphStep(
                graph=f"graphs/segment_{layer}.onnx",
                inputs={"x": value},
                outputs=outputs,
                experts=fused,
            )
        )
    # The same routing through plain experts steps, one router for all layers.
    for layer in range(len(WIDTHS)):
        prefill.append(
            GraphStep(
                graph="graphs/router.onnx",
                inputs={"x": "x"},
                outputs={"ids": f"ids.{layer}", "gates": f"gates.{layer}"},
            )
        )
        prefill.append(
            ExpertsStep(
                layer=layer,
                x="x" if layer == 0 else f"y.{layer - 1}",
                ids=f"ids.{layer}",
                gates=f"gates.{layer}",
                y=f"y.{layer}",
            )
        )
    b = GraphBuilder("router")
    x = b.input("x", "f32", ["T", D])
    ids = b.cast(b.op("Slice", x, b.const([0]), b.const([2]), b.const([1])), "i64")
    b.output(ids, "ids", "i64", ["T", 2])
    b.output(b.op("Mul", b.cast(ids, "f32"), b.const([0.5], np.float32)), "gates", "f32", ["T", 2])
    graphs = {
        "graphs/router.onnx": b.build(),
        "graphs/counter.onnx": _counter(),
        "graphs/echo.onnx": _echo(),
        **{f"graphs/segment_{n}.onnx": _segment(n) for n in range(len(WIDTHS) + 1)},
        **{f"graphs/kind_{width}.onnx": _kind_graph(width) for width in WIDTHS},
    }
    plan = Plan(
        inputs={"x": ValueSpec(dtype="f32", shape=("T", D))},
        outputs={
            "seen": ValueSpec(dtype="f32", shape=("T",)),
            "count": ValueSpec(dtype="f32", shape=("T",)),
            "y": ValueSpec(dtype="f32", shape=("T", D), value="y.2"),
        },
        state={"count": StateSpec(dtype="f32", shape=(1,))},
        prefill=(*counting, *prefill),
        decode=(*counting, *decode),
    )
    manifest = manifest_of(
        plan,
        kinds={
            f"w{width}": kind_of(layout, f"graphs/kind_{width}.onnx")
            for width, layout in zip(WIDTHS, layouts, strict=True)
        },
        layers=tuple(
            Layer(layer=n, kind=f"w{width}", experts=4, top_k=2) for n, width in enumerate(WIDTHS)
        ),
    )
    shards = [
        (
            (layer, expert),
            layout,
            {
                spec.name: rng.normal(size=spec.shape).astype(np.float32) * 0.01
                for spec in layout.tensors
            },
        )
        for layer, layout in enumerate(layouts)
        for expert in range(4)
    ]
    return write_package(tmp_path / "uneven", manifest, graphs, shards)


def test_the_budget_holds_when_experts_differ_in_size(
    uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every slot's memory is counted by what is alive, not by the pager's own books."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Counted(devices.CpuSlot):
        pass  # no __slots__, so that it can be referred to weakly

    def slots(self: devices.CpuDevice, size: int, most: int) -> Any:
        def new() -> Any:
            slot = Counted(np.zeros(size, dtype=np.uint8))
            alive.add(slot)
            return slot

        return new

    monkeypatch.setattr(devices.CpuDevice, "slots", slots)
    manifest = em.load(uneven).manifest
    slot = max(kind.bytes for kind in manifest.kinds.values())
    with pytest.raises(BudgetError, match=str(2 * slot)):
        em.load(uneven, budget=2 * slot - 1)
    picks = np.float32([[a, b, 0, 0] for a in range(4) for b in range(4) if a != b])
    with em.load(uneven, budget=2 * slot) as model:
        alive.clear()
        states = [model.new_state() for _ in range(6)]
        for state in states:
            for row in picks:
                model.forward({"x": row[None]}, state=state, steps="decode")
                model.forward({"x": row[None]}, state=state)
        gc.collect()
        assert sum(one.bytes for one in alive) <= model.budget
        assert model.stats().peak_resident_expert_bytes <= model.budget


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a_replaced_state_counts_from_the_next_call(uneven: Path, steps: Any) -> None:
    with em.load(uneven) as model:
        state = model.new_state()
        x = np.float32([[0, 1, 0, 0]])
        for call in range(3):
            outputs = model.forward({"x": x}, state=state, steps=steps)
            assert outputs["seen"].tolist() == [call]
            assert outputs["count"].tolist() == [call + 1]
        assert state.current["count"].tolist() == [3]


@pytest.mark.parametrize("steps", ["prefill", "decode"])
@pytest.mark.parametrize("picks", [[1, 1], [0, 4], [-1, 2]])
def test_a_router_that_answers_nonsense_is_refused(
    uneven: Path, steps: Any, picks: list[int]
) -> None:
    with em.load(uneven) as model:
        x = np.float32([[*picks, 0, 0]])
        state = model.new_state()
        with pytest.raises(GraphError, match="expected"):
            model.forward({"x": x}, state=state, steps=steps)
        assert model._pager.slots.pinned == 0
        assert state.current["count"].tolist() == [0.0]


def test_what_stops_the_import_of_onnx_runtime_is_told(lm_package: Path) -> None:
    """Not installed, broken, or Ctrl-C, which its binary part turns into an ImportError."""
    program = """
import sys, evermind_runtime as em
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            exec(sys.argv[2])
sys.meta_path.insert(0, Finder())
try:
    em.load(sys.argv[1])
except BaseException as error:
    print(type(error).__name__, error)
"""
    causes = {
        "raise ModuleNotFoundError('no', name=name)": "MissingExtraError Running a package needs",
        "raise ImportError('no such library')": "DeviceError the installed onnxruntime cannot be",
        "raise ImportError('stopped') from KeyboardInterrupt()": "KeyboardInterrupt",
    }
    for cause, expected in causes.items():
        command = [sys.executable, "-c", program, str(lm_package), cause]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith(expected), said
