"""The runtime against the peer's own numbers (specs/evermind-formats.md, section 17).

Tolerance: 2e-6 of an output's largest magnitude, float32 graphs against float64 sums.
Routes, ties included, and generated tokens are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest

from tests.packages import golden_case

TOLERANCE = 2e-6
MOE = ["moe_small", "moe_six", "moe_default"]
LM = ["lm_small", "lm_init", "lm_trained", "lm_default"]
LIMBIC = ["limbic_small", "limbic_default"]
STEPS = ["prefill", "decode"]

Packages = Callable[..., Path]


def assert_close(found: np.ndarray, expected: Any) -> None:
    expected = np.asarray(expected, dtype=np.float64)
    scale = np.abs(expected).max() or 1.0
    assert np.abs(found - expected).max() <= TOLERANCE * scale


@pytest.fixture(params=["75%", None], ids=["paged", "resident"])
def budget(request: pytest.FixtureRequest) -> str | None:
    """Room for some of the experts, or for all of them in pools."""
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", MOE)
def test_moe(
    golden_package: Packages, name: str, steps: Any, half: bool, budget: str | None
) -> None:
    case = golden_case(name)
    width = case["config"].get("modelDim", 64)
    x = np.zeros((len(case["inputs"]), width), dtype=np.float32)
    for row, values in zip(x, case["inputs"], strict=True):
        row[: len(values)] = values[:width]
    expected = case["expected_fp16" if half else "expected_f32"]
    with em.load(golden_package(name, half=half), budget=budget) as model:
        outputs = model.forward({"x": x}, steps=steps)
    assert_close(outputs["y"], [one["output"] for one in expected])
    assert outputs["ids.0"].tolist() == [one["experts"] for one in expected]
    np.testing.assert_allclose(
        outputs["gates.0"], [one["gates"] for one in expected], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", LM)
def test_lm_logits_and_routes(
    golden_package: Packages, name: str, steps: Any, budget: str | None
) -> None:
    case = golden_case(name)
    with em.load(golden_package(name), budget=budget) as model:
        for one in case["forward"]:
            if not one["tokens"]:
                continue
            outputs = model.forward({"tokens": one["tokens"]}, steps=steps)
            assert_close(outputs["logits"], one["logits"])
            for layer, positions in enumerate(_by_layer(one["routes"], model)):
                found = outputs[f"ids.{layer}"].tolist()
                assert found == [position["experts"] for position in positions]


def _by_layer(routes: list[Any], model: em.Model) -> list[list[Any]]:
    """Routes as [layer][position], whichever way round they are stored."""
    layers = len(model.manifest.layers)
    if len(routes) == layers and len(routes[0]) != layers:
        return routes
    return [[position[layer] for position in routes] for layer in range(layers)]


@pytest.mark.parametrize("name", ["lm_small", "lm_trained"])
def test_half_lm_logits(golden_package: Packages, name: str, budget: str | None) -> None:
    with em.load(golden_package(name, half=True), budget=budget) as model:
        for one in golden_case(name)["forward"]:
            if "logits_fp16" in one:
                outputs = model.forward({"tokens": one["tokens"]})
                assert_close(outputs["logits"], one["logits_fp16"])


@pytest.mark.parametrize("name", LM)
def test_greedy_and_sampled_tokens(golden_package: Packages, name: str, budget: str | None) -> None:
    case = golden_case(name)
    with em.load(golden_package(name), budget=budget) as model:
        for one in [*case["greedy"], *case["sampled"]]:
            stop = one.get("stop_token")
            pieces = model.generate(
                one["prompt"],
                max_new_tokens=one["max_new_tokens"],
                temperature=one.get("temperature", 0),
                seed=one.get("seed"),
                stop_tokens=None if stop is None else [stop],
            )
            assert [piece.token for piece in pieces] == one["tokens"], one


@pytest.mark.parametrize("name", LM)
def test_half_greedy_tokens(golden_package: Packages, name: str, budget: str | None) -> None:
    one = golden_case(name)["greedy_fp16"]
    with em.load(golden_package(name, half=True), budget=budget) as model:
        pieces = model.generate(one["prompt"], max_new_tokens=one["max_new_tokens"])
        assert [piece.token for piece in pieces] == one["tokens"]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", LIMBIC)
def test_limbic(golden_package: Packages, name: str, steps: Any, half: bool) -> None:
    recorded = golden_case(name)["steps_fp16" if half else "steps_f32"]
    inputs = {
        "x": [step["x"] for step in recorded],
        "hidden": [step["hidden_in"] for step in recorded],
        "state": [step["state_in"] for step in recorded],
    }
    with em.load(golden_package(name, half=half)) as model:
        outputs = model.forward({k: np.float32(v) for k, v in inputs.items()}, steps=steps)
    assert_close(outputs["hidden"], [step["hidden"] for step in recorded])
    assert_close(outputs["delta"], [step["delta"] for step in recorded])
    assert_close(outputs["reward"], [step["reward_f64"] for step in recorded])
