"""The plan's vocabulary beyond what today's exporters use: the runtime knows no family.

A hand-made package: two layers share one trunk graph through `weights`, decode has a plain
experts step, and one layer's experts look at the whole sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_exporters.resident import pack_resident
from evermind_manifests.manifest import (
    RESIDENT_NAME,
    ExpertsStep,
    GraphStep,
    Layer,
    Plan,
    Step,
    ValueSpec,
)
from evermind_manifests.shard import plan_shard

from tests.runtime.hand_made import kind_of, manifest_of, write_package

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

D, E, K = 6, 4, 2
RNG = np.random.default_rng(11)
ROUTERS = [RNG.normal(size=(D, E)).astype(np.float32) for _ in range(2)]
EXPERTS = RNG.normal(size=(2, E, D, D)).astype(np.float32)

Scope = Literal["token", "sequence"]


def trunk_graph() -> bytes:
    b = GraphBuilder("trunk")
    x = b.input("x", "f32", ["T", D])
    logits = b.op("MatMul", x, b.input("router", "f32", [D, E]))
    top, ids = b.op("TopK", logits, b.const([K]), outputs=2, axis=-1)
    b.output(ids, "ids", "i64", ["T", K])
    b.output(b.op("Softmax", top, axis=-1), "gates", "f32", ["T", K])
    return b.build()


def expert_graph(scope: Scope) -> bytes:
    """Linear; a sequence expert adds the running sum of all rows so far."""
    b = GraphBuilder("expert")
    x = b.input("x", "f32", ["rows", D])
    w = b.input("w", "f32", [D, D])
    if scope == "sequence":
        x = b.op("CumSum", x, b.const(0))
    b.output(b.op("MatMul", x, w), "y", "f32", ["rows", D])
    return b.build()


def write(path: Path, scope: Scope) -> Path:
    resident, _ = pack_resident({f"router.{layer}": ROUTERS[layer] for layer in range(2)})
    layout = plan_shard("linear", "none", [("w", "f32", (D, D))])
    steps: list[Step] = []
    for layer, value in enumerate(("x", "h")):
        steps += [
            GraphStep(
                graph="graphs/trunk.onnx",
                inputs={"x": value},
                outputs={"ids": f"ids.{layer}", "gates": f"gates.{layer}"},
                weights={"router": f"router.{layer}"},
            ),
            ExpertsStep(
                layer=layer,
                x=value,
                ids=f"ids.{layer}",
                gates=f"gates.{layer}",
                y="h" if layer == 0 else "y",
            ),
        ]
    plan = Plan(
        inputs={"x": ValueSpec(dtype="f32", shape=("T", D))},
        outputs={
            "y": ValueSpec(dtype="f32", shape=("T", D)),
            "ids.1": ValueSpec(dtype="i64", shape=("T", K)),
        },
        state={},
        prefill=tuple(steps),
        decode=tuple(steps),
    )
    manifest = manifest_of(
        plan,
        kinds={"linear": kind_of(layout, "graphs/expert.onnx", scope=scope)},
        layers=tuple(Layer(layer=layer, kind="linear", experts=E, top_k=K) for layer in range(2)),
        resident=RESIDENT_NAME,
    )
    files = {
        "graphs/trunk.onnx": trunk_graph(),
        "graphs/expert.onnx": expert_graph(scope),
        RESIDENT_NAME: resident,
    }
    shards = [
        ((layer, expert), layout, {"w": EXPERTS[layer, expert]})
        for layer in range(2)
        for expert in range(E)
    ]
    return write_package(path, manifest, files, shards)


def expected(x: np.ndarray, scope: Scope) -> np.ndarray:
    for layer in range(2):
        logits = x @ ROUTERS[layer]
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :K]
        top = np.take_along_axis(logits, ids, axis=1)
        gates = np.exp(top - top.max(axis=1, keepdims=True))
        gates /= gates.sum(axis=1, keepdims=True)
        seen = np.cumsum(x, axis=0) if scope == "sequence" else x
        y = np.zeros_like(x)
        for t in range(len(x)):
            for i in range(K):
                y[t] += gates[t, i] * (seen[t] @ EXPERTS[layer, ids[t, i]])
        x = y
    return x


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("budget", ["25%", "100%"])
def test_prefill(tmp_path: Path, scope: Scope, budget: str) -> None:
    x = RNG.normal(size=(9, D)).astype(np.float32)
    with em.load(write(tmp_path / "p", scope), budget=budget) as model:
        y = model.forward({"x": x})["y"]
    np.testing.assert_allclose(y, expected(x, scope), rtol=0, atol=1e-5 * np.abs(y).max())


def test_a_sequence_expert_is_never_cut_into_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_runtime.model.PREFILL_CHUNK", 4)
    x = RNG.normal(size=(9, D)).astype(np.float32)
    with em.load(write(tmp_path / "p", "sequence")) as model:
        y = model.forward({"x": x})["y"]
    np.testing.assert_allclose(y, expected(x, "sequence"), rtol=0, atol=1e-5 * np.abs(y).max())


def test_decode_with_plain_experts_steps(tmp_path: Path) -> None:
    x = RNG.normal(size=(5, D)).astype(np.float32)
    with em.load(write(tmp_path / "p", "token"), budget="25%") as model:
        decoded = model.forward({"x": x}, steps="decode")
        assert decoded["ids.1"].shape == (5, K)
        prefilled = model.forward({"x": x})
    np.testing.assert_allclose(decoded["y"], prefilled["y"], atol=1e-5)


def test_only_what_is_wanted_is_computed(tmp_path: Path) -> None:
    with em.load(write(tmp_path / "p", "token")) as model:
        x = RNG.normal(size=(3, D)).astype(np.float32)
        assert model.forward({"x": x}, outputs=[]) == {}
        assert model.stats().expert_misses == 0
        ids = model.forward({"x": x}, outputs=["ids.1"])
        assert set(ids) == {"ids.1"}
        # The second layer's router needs the first layer's experts, and no more.
        assert all(layer == 0 for layer, _ in model._pager.slots.resident)
