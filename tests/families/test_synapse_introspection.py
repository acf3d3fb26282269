"""Introspection gives the seed's statistics (specs/synapse.md, section 5) from our own report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_runtime.observer import KEPT_TOKENS

from evermind_pack.cli import main
from tests.golden_families import family_case
from tests.packages import export, lm_source

from .synapse import forget_window, package

Report = dict[str, Any]


def observed(name: str) -> em.Model:
    model = em.load(package(name))
    model.observe()
    return model


def same(found: Any, expected: Any, where: str = "") -> None:
    """Counts and labels are equal, numbers within the golden tolerance."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), where
    else:
        assert found == expected, where


def seed_experts(report: Report, layer: int, tokens: int) -> Report:
    """A layer as the seed's pool shows it; its `specialization_score` is always 0."""
    found = report["layers"][layer]
    return {
        "expert_stats": [
            {
                "name": f"expert_{one['expert']}",
                "tokens_processed": one["tokens"],
                "avg_output_magnitude": one.get("magnitude", 0.0),
                "avg_activation_sparsity": one.get("sparsity", 0.0),
                "specialization_score": 0.0,
            }
            for one in found["experts"]
        ],
        "top_contributors": found["top_contributors"],
        "total_tokens": tokens,
        "activation_sparsity": found["unused_share"],
    }


def seed_router(report: Report, router: int, rows: int) -> Report:
    """A router as the seed shows it: the decisions of the batch's first row only."""
    found = dict(report["routers"][router])
    decisions = found["decisions"][: len(found["decisions"]) // rows]
    confidence = float(np.mean([min(one["confidence"], 100.0) for one in decisions]))
    if rows == 1:
        assert confidence == pytest.approx(found["avg_confidence"])
    return found | {"decisions": decisions, "avg_confidence": confidence}


def seed_xlstm(observations: Report, prefix: str = "") -> Report:
    gates = {
        f"{name}_gate_values": observations[f"{prefix}{name}_gate"]
        for name in ("input", "forget", "output")
    }
    norms = observations[f"{prefix}memory_norms"]
    return {
        **gates,
        "memory_norms": norms,
        "memory_age": [0] * len(norms[0]),
        "seq_len": len(norms),
    }


def seed_memory(observations: Report, size: int, prefix: str = "") -> Report:
    values = {
        name: observations[prefix + name]
        for name in ("write_strength", "write_key_norm", "write_value_norm", "read_norm")
    }
    writes = [
        {
            "step": step,
            "head": head,
            "strength": strength,
            "key_norm": values["write_key_norm"][step][head],
            "value_norm": values["write_value_norm"][step][head],
        }
        for step, strengths in enumerate(values["write_strength"])
        for head, strength in enumerate(strengths)
        if strength > 0.001
    ]
    reads = []
    for step, norms in enumerate(values["read_norm"]):
        best = max(norms)
        # The seed keeps the last of equal heads.
        head = len(norms) - 1 - norms[::-1].index(best)
        reads.append({"step": step, "confidence": best, "dominant_head": head, "value_norm": best})
    filled = observations[f"{prefix}memory_utilization"]
    return {
        "writes": writes,
        "reads": reads,
        "memory_utilization": filled,
        "capacity_remaining": max(0.0, 1 - float(np.mean(filled)) / size**2),
        "estimated_facts_stored": len(writes),
        "total_steps": len(reads),
        "n_writes": len(writes),
        "n_reads": len(reads),
    }


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_an_expert_by_itself(steps: Any) -> None:
    case = family_case("synapse_expert")
    with observed("expert") as model:
        model.forward({"x": case.inputs["x"]}, steps=steps)
        (found,) = seed_experts(model.introspect().to_dict(), 0, 7)["expert_stats"]
    same(found, case.expected["per_token_calls"])


def test_a_pool_over_two_calls() -> None:
    case = family_case("synapse_pool")
    names = ("x", "expert_indices", "routing_weights")
    with observed("pool") as model:
        model.forward({name: case.inputs[name] for name in names})
        found = seed_experts(model.introspect().to_dict(), 0, 12)
        same(found, case.expected["introspection"])
        model.forward({name: case.inputs[f"{name}_next"] for name in names})
        report = model.introspect()
        found = seed_experts(report.to_dict(), 0, 2)
        same(found, case.expected["introspection_after_second_call"])
        used = [one.expert for one in report.layers[0].experts if one.tokens]
        assert used == case.expected["experts_used"]


def test_specialization_is_the_distance_from_the_pools_mean_output() -> None:
    case = family_case("synapse_pool")
    names = ("x", "expert_indices", "routing_weights")
    given = {name: case.inputs[name][0] for name in names}
    with observed("pool") as model:
        model.forward(given)
        found = [one.specialization for one in model.introspect().layers[0].experts]
        assert model.introspect().layers[0].specialization == pytest.approx(np.mean(found))
    outputs: dict[int, list[Any]] = {expert: [] for expert in range(5)}
    for x, experts in zip(given["x"], given["expert_indices"], strict=True):
        for expert in experts:
            gate, up, down = (
                case.weights[f"experts.{expert}.{name}.weight"].astype(np.float64)
                for name in ("w_gate", "w_up", "w_down")
            )
            z = gate @ x
            outputs[int(expert)].append(down @ (z / (1 + np.exp(-z)) * (up @ x)))
    everything = np.mean([y for ys in outputs.values() for y in ys], axis=0)
    for expert, ys in outputs.items():
        distance = np.sqrt(np.mean((np.mean(ys, axis=0) - everything) ** 2))
        assert found[expert] == pytest.approx(distance, rel=1e-4)


def test_a_routers_decisions_and_pathways() -> None:
    case = family_case("synapse_thalamus")
    with observed("thalamus") as model:
        states = [model.new_state(), model.new_state()]
        model.forward({"x": case.inputs["x"]}, state=states)
        report = model.introspect()
        same(seed_router(report.to_dict(), 0, 2), case.expected["introspection_first"])
        same(report.routers[0].pathways, case.expected["hebbian_after_first"])
        forget_window(states)
        model.forward({"x": case.inputs["x_next"]}, state=states)
        # Pathways go on over calls; what the seed shows of a call is that call's.
        same(model.introspect().routers[0].pathways, case.expected["hebbian_after_second"])


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_gate_values_and_norms_of_an_xlstm(steps: Any) -> None:
    case = family_case("synapse_xlstm")
    with observed("xlstm") as model:
        states = [model.new_state()]
        model.forward({"x": case.inputs["x"]}, state=states, steps=steps)
        found = seed_xlstm(model.introspect().to_dict()["observations"])
        same(found, case.expected["introspection_first"])
        model.observe()
        model.forward({"x": case.inputs["x_next"]}, state=states, steps=steps)
        found = seed_xlstm(model.introspect().to_dict()["observations"])
        same(found, case.expected["introspection_second"])


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_what_a_memory_reads_and_writes(steps: Any) -> None:
    case = family_case("synapse_fast_weights")
    with observed("fast_weights") as model:
        states = [model.new_state()]
        for call, suffix in (("first", ""), ("second", "_next")):
            model.forward({"x": case.inputs[f"x{suffix}"]}, state=states, steps=steps)
            found = seed_memory(model.introspect().to_dict()["observations"], 5)
            same(found, case.expected[f"introspection_{call}"])


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_the_whole_model(steps: Any) -> None:
    case = family_case("synapse_model")
    expected = case.expected["introspection_first"]
    with observed("model") as model:
        state = model.new_state()
        given = {"tokens": case.inputs["input_ids"][0]}
        logits = model.forward(given, state=state, steps=steps)["logits"]
        case.close("logits", logits, case.outputs["logits"][0])
        report = model.introspect().to_dict()
        for number, layer in enumerate(expected["layers"]):
            same(seed_router(report, number, 1), layer["thalamus"])
            same(seed_experts(report, number, 12), layer["experts"])
            seen = report["observations"]
            same(seed_xlstm(seen, f"xlstm.{number}."), layer["xlstm"])
            same(seed_memory(seen, 8, f"memory.{number}."), layer["memory"])
        confidence = np.mean([router["avg_confidence"] for router in report["routers"]])
        assert confidence == pytest.approx(expected["routing_confidence"], rel=1e-4)
        pathways: Counter[str] = Counter()
        for router in model.introspect().routers:
            pathways.update(router.pathways)
        found = sorted(pathways.items(), key=lambda item: -item[1])[:10]
        same(dict(found), dict(expected["global_pathways"]))
        forget_window([state])
        model.forward({"tokens": case.inputs["input_ids_next"][0]}, state=state, steps="prefill")
        for router, strengths in zip(
            model.introspect().routers, case.expected["hebbian_after_two_calls"], strict=True
        ):
            same(router.pathways, strengths)


def test_observing_changes_no_result_and_ends() -> None:
    tokens = {"tokens": np.arange(20) % 40}
    with em.load(package("model")) as model:
        plain = model.forward(tokens)
        assert model.introspect().observed_tokens == 0
        assert model.introspect().observations == {}
        model.observe()
        watched = model.forward(tokens)
        assert model.introspect().observed_tokens == 20
        assert model.introspect().tokens == 40
        model.observe(False)
        model.forward(tokens)
        report = model.introspect()
        assert (report.observed_tokens, report.routers) == (0, ())
        # Counters need no observer.
        counted = [sum(one.tokens for one in layer.experts) for layer in report.layers]
        assert counted == [120, 120]
        for layer in report.layers:
            assert sum(one.gate_mass for one in layer.experts) == pytest.approx(60)
    for name, array in plain.items():
        np.testing.assert_allclose(watched[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_counters_are_the_same_in_both_programs_and_add_up() -> None:
    tokens = {"tokens": np.arange(20) % 40}
    found = []
    for steps in ("prefill", "decode"):
        with em.load(package("model")) as model:
            model.forward(tokens, steps=steps)  # type: ignore[arg-type]
            report, stats = model.introspect(), model.stats()
            experts = [one for layer in report.layers for one in layer.experts]
            assert sum(one.hits for one in experts) == stats.expert_hits
            assert sum(one.misses for one in experts) == stats.expert_misses
            assert sum(one.bytes_read for one in experts) == stats.bytes_read
            found.append([(one.tokens, round(one.gate_mass, 4)) for one in experts])
    assert found[0] == found[1]


def test_only_the_last_tokens_are_kept() -> None:
    count = KEPT_TOKENS + 100
    x = np.random.default_rng(1).normal(size=(count, 16)).astype(np.float32)
    with observed("thalamus") as model:
        model.forward({"x": x})
        (router,) = model.introspect().routers
        assert len(router.decisions) == KEPT_TOKENS
        assert router.counts.sum() == 2 * router.tokens == 2 * count
    with observed("fast_weights") as model:
        model.forward({"x": x[:, :14]})
        found = model.introspect().observations["write_strength"]
        model.observe()
        model.forward({"x": x[-512:, :14]})
        last = model.introspect().observations["write_strength"]
    assert found.shape == (KEPT_TOKENS, 2)
    np.testing.assert_allclose(found[-512:], last, rtol=1e-5)


def test_prometheus_text() -> None:
    with observed("model") as model:
        model.forward({"tokens": np.arange(9)})
        report = model.introspect()
    lines = report.to_prometheus().splitlines()
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line[0] != "#"}
    one = report.layers[1].experts[2]
    assert values['evermind_expert_tokens_total{layer="1",expert="2"}'] == one.tokens
    assert values['evermind_expert_magnitude{layer="1",expert="2"}'] == pytest.approx(
        one.statistics["magnitude"]
    )
    label, strength = next(iter(report.routers[0].pathways.items()))
    assert values[f'evermind_pathway_strength{{layer="0",pathway="{label}"}}'] == pytest.approx(
        strength
    )
    named = {line.split(" ")[2] for line in lines if line.startswith("# TYPE")}
    assert {name.partition("{")[0] for name in values} == named


def test_heat_is_the_share_of_places() -> None:
    with em.load(package("model")) as model:
        model.forward({"tokens": np.arange(9)})
        layers, rows = model.introspect().heat()
    assert layers == [0, 1]
    np.testing.assert_allclose(np.sum(rows, axis=1), 1.0)


def test_run_introspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(package("model")), "--tokens", "1,2,3", "--max-new", "4", "--introspect"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["introspection"]
    assert found["observed_tokens"] == 6
    assert {"magnitude", "sparsity"} <= found["layers"][0]["experts"][0].keys()
    assert main(command) == 0
    text = capsys.readouterr()
    assert "top contributors" in text.out + text.err
    assert "language" in text.out + text.err
    files = [str(tmp_path / "metrics.txt"), str(tmp_path / "heat.png")]
    assert main([*command, "-q", "--prometheus", files[0], "--heatmap", files[1]]) == 0
    assert 'evermind_expert_magnitude{layer="0",expert="0"}' in Path(files[0]).read_text()
    assert Path(files[1]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_other_families_have_statistics_too(tmp_path: Path, steps: Any) -> None:
    with em.load(export(lm_source(), tmp_path / "package")) as model:
        plain = model.forward({"tokens": np.arange(12)}, steps=steps)
        model.observe()
        found = model.forward({"tokens": np.arange(12)}, steps=steps)
        np.testing.assert_allclose(found["logits"], plain["logits"], rtol=1e-4, atol=1e-4)
        report = model.introspect()
    for layer in report.layers:
        ran = [one for one in layer.experts if one.tokens]
        assert all(one.statistics["magnitude"] > 0 for one in ran)
        # About half of what a ReLU gives is nothing.
        assert 0.2 < np.mean([one.statistics["sparsity"] for one in ran]) < 0.8
        assert layer.specialization > 0
