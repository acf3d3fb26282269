"""Plan R: every expert in a pool, one graph a token; it agrees with the others within rounding."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters.families import evermind_lm
from evermind_manifests.errors import BudgetError, ClosedError, InputError, UnsupportedError
from evermind_manifests.manifest import Manifest
from evermind_runtime.budget import total_expert_bytes, working_set_bytes
from evermind_runtime.choose_plan import choose_plan
from evermind_runtime.pools import pool_bytes
from evermind_runtime.trace import read_trace

from tests.packages import LM_CONFIG, export, golden_source, lm_source, random_source

TOKENS = {"tokens": np.arange(50) * 7 % LM_CONFIG["vocabSize"]}
MOE_CONFIG = {"modelDim": 24, "hiddenDim": 40, "numExperts": 6, "topK": 3}


@pytest.fixture(scope="module", params=["f16", "bf16", "f32"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lm_source(), tmp_path_factory.mktemp("pooled") / "p", dtype=request.param)


@pytest.fixture(scope="module")
def manifest(lm_package: Path) -> Manifest:
    with em.load(lm_package) as model:
        return model.manifest


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, expected in other.items():
        if expected.dtype.kind == "i":
            np.testing.assert_array_equal(one[name], expected, name)
        else:
            # Sums of a few hundred float32 products in another order.
            atol = 2e-5 * float(np.abs(expected).max())
            np.testing.assert_allclose(one[name], expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_it_agrees_with_the_other_plans(package: Path, steps: Any) -> None:
    with em.load(package, plan="resident") as pooled, em.load(package, plan="half") as half:
        states = pooled.new_state(), half.new_state()
        close(
            pooled.forward(TOKENS, steps=steps, state=states[0]),
            half.forward(TOKENS, steps=steps, state=states[1]),
        )
        close(states[0].save(), states[1].save())
        stats = pooled.stats()
        assert stats.resident_expert_bytes <= pooled.budget
        assert stats.peak_resident_expert_bytes <= pooled.budget


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a_lone_layer_agrees(tmp_path: Path, steps: Any) -> None:
    package = export(random_source("shared-expert-moe", MOE_CONFIG), tmp_path / "p")
    x = {"x": np.random.default_rng(1).normal(size=(2, 9, 24)).astype(np.float32)}
    with em.load(package, plan="resident") as pooled, em.load(package, plan="half") as half:
        close(pooled.forward(x, steps=steps), half.forward(x, steps=steps))


def test_routes_are_counted_and_recorded_all_the_same(package: Path, tmp_path: Path) -> None:
    lines, counts = [], []
    for plan in ("resident", "half"):
        with em.load(package, plan=plan) as model:  # type: ignore[arg-type]
            model.trace(tmp_path / plan)
            state = model.new_state()
            model.forward(TOKENS, state=state)
            model.forward(TOKENS, state=state, steps="decode")
            stats = model.stats()
            counts.append([layer.experts for layer in model.introspect().layers])
        trace = read_trace(tmp_path / plan)
        lines.append(trace.steps)
        assert stats.tokens == 100
        # Prefill uses an expert once a chunk, pools count every token's use.
        assert stats.expert_hits >= 50 * 3 * 2
    assert lines[0] == lines[1]
    tokens = [[[e.tokens for e in layer] for layer in one] for one in counts]
    assert tokens[0] == tokens[1]
    mass = [[[e.gate_mass for e in layer] for layer in one] for one in counts]
    np.testing.assert_allclose(mass[0], mass[1], rtol=1e-4)


def test_what_is_decoded_is_counted_when_somebody_looks(lm_package: Path, tmp_path: Path) -> None:
    token = {"tokens": np.array([3])}
    with em.load(lm_package, plan="resident") as model, em.load(lm_package, plan="half") as half:
        states = model.new_state(), half.new_state()
        most = model._engine.served_tokens.most
        looks = {1, most, most + 1}
        for made in range(1, max(looks) + 1):
            model.decode(token, states[0])
            half.decode(token, states[1])
            if made in looks:
                counts = [
                    [[e.tokens for e in layer.experts] for layer in one.introspect().layers]
                    for one in (model, half)
                ]
                assert counts[0] == counts[1]
                assert model.stats().expert_hits == sum(map(sum, counts[0])) == made * 3 * 2
                assert model.introspect().layers[0].experts[0].hits == counts[0][0][0]
        # A trace begins with the tokens after it.
        model.decode(token, states[0])
        model.trace(tmp_path / "trace")
        model.decode(token, states[0])
        model.trace(None)
        model.decode(token, states[0])
    steps = read_trace(tmp_path / "trace").steps
    assert [(step.layer, len(step.tokens)) for step in steps] == [(0, 1), (1, 1), (2, 1)]


def test_several_threads_are_counted_together(lm_package: Path) -> None:
    with em.load(lm_package, plan="resident") as model:
        count = 2 * model._engine.served_tokens.most // 3
        start = threading.Barrier(4)

        def decode() -> None:
            state = model.new_state()
            start.wait()
            for _ in range(count):
                model.decode({"tokens": np.array([3])}, state)

        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(decode) for _ in range(4)]:
                done.result()
        used = [sum(e.tokens for e in layer.experts) for layer in model.introspect().layers]
        assert used == [4 * count * 2] * 3
        assert model.stats().expert_hits == sum(used)


def test_the_budget_decides(lm_package: Path, manifest: Manifest) -> None:
    total, least = total_expert_bytes(manifest), working_set_bytes(manifest)
    pooled = pool_bytes(manifest) + 2 * least
    assert pooled > 2 * total - 64 * 1024
    for budget, name in ((None, "resident"), (pooled, "resident"), (pooled - 1, "half")):
        with em.load(lm_package, budget=budget) as model:
            assert model.plan.name == name
            assert model.budget == {"resident": pooled, "half": total}[name]
    for budget, name in ((total, "half"), ("100%", "half"), (total - 1, "paged")):
        with em.load(lm_package, budget=budget) as model:
            assert model.plan.name == name
    assert model.plan.reason == "the budget holds 100% of the experts"
    with em.load(lm_package, plan="paged") as model:
        assert (model.plan.name, model.budget) == ("paged", total)


def test_a_plan_that_cannot_be_had_is_refused(manifest: Manifest) -> None:
    total = total_expert_bytes(manifest)
    with pytest.raises(InputError, match="plan: expected one of"):
        choose_plan("fast", manifest, None, "cpu", None)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="'resident' takes"):
        choose_plan("resident", manifest, total, "cpu", None)
    with pytest.raises(BudgetError, match="'half' keeps all"):
        choose_plan("half", manifest, total - 1, "cpu", None)
    with pytest.raises(UnsupportedError, match="runs on the cpu"):
        choose_plan("resident", manifest, None, "cuda:0", None)


def test_pools_must_leave_memory_to_others(manifest: Manifest) -> None:
    pooled = pool_bytes(manifest) + 2 * working_set_bytes(manifest)
    assert choose_plan("auto", manifest, None, "cpu", 2 * pooled).name == "resident"
    assert choose_plan("auto", manifest, None, "cpu", 2 * pooled - 2).name == "half"
    assert choose_plan("resident", manifest, None, "cpu", 0).name == "resident"


def test_a_family_without_pools_says_so(tmp_path: Path) -> None:
    package = export(golden_source("limbic_small"), tmp_path / "p", dtype="f32")
    with pytest.raises(UnsupportedError, match="needs pooled programs"):
        em.load(package, plan="resident")
    with em.load(package) as model:
        assert model.plan.name == "half"


@pytest.mark.parametrize("tokens", [1, "T"])
def test_a_wrong_operator_is_found_out(
    tokens: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this ONNX Runtime's MoE meant something else than the exporter did."""
    honest = evermind_lm._pooled

    def other(dims: Any, count: int | str, *rest: Any) -> bytes:
        graph = honest(dims, count, *rest)
        return graph.replace(b"relu", b"silu") if count == tokens else graph

    monkeypatch.setattr(evermind_lm, "_pooled", other)
    package = export(lm_source(), tmp_path / "p")
    with em.load(package) as model:
        assert model.plan.name == "half"
        assert "failed their self-test (" in model.plan.reason
        assert "off by" in model.plan.reason
        assert model.budget == total_expert_bytes(model.manifest)
        model.forward(TOKENS)
    with pytest.raises(UnsupportedError, match="do not compute what the others do"):
        em.load(package, plan="resident")


def test_a_closed_model_runs_nothing_more(lm_package: Path) -> None:
    model = em.load(lm_package, plan="resident")
    state = model.new_state()
    pieces = model.generate([1, 2], max_new_tokens=9, state=state)
    next(pieces)
    model.close()
    with pytest.raises(ClosedError):
        next(pieces)
    with pytest.raises(ClosedError):
        model.decode({"tokens": np.array([1])}, state)


def test_a_negative_budget_is_refused(tmp_path: Path) -> None:
    package = export(golden_source("limbic_small"), tmp_path / "p", dtype="f32")
    with pytest.raises(BudgetError, match="found '-5'"):
        em.load(package, budget=-5)
