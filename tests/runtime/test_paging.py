"""Paged = unpaged bit for bit, prefill against decode, and the budget's hardness."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import BudgetError
from evermind_runtime.budget import (
    token_cycle_bytes,
    total_expert_bytes,
    working_set_bytes,
)
from evermind_runtime.forecast import expected_hit_rate
from evermind_runtime.openers import open_location
from evermind_runtime.sizes import manifest_sizes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.packages import LM_CONFIG, export, random_source

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

VOCABULARY = LM_CONFIG["vocabSize"]
prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def unpaged(lm_package: Path) -> em.Model:
    return em.load(lm_package, plan="half")


@pytest.fixture(scope="module", params=["least", "25%", "50%", "100%"])
def paged(lm_package: Path, request: pytest.FixtureRequest) -> em.Model:
    budget: str | int = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if budget == "least":
            budget = working_set_bytes(em.load(lm_package).manifest)
        return em.load(lm_package, budget=budget)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(tokens=prompts, steps=st.sampled_from(["prefill", "decode"]))
def test_paged_runs_give_the_same_bits(
    paged: em.Model, unpaged: em.Model, tokens: list[int], steps: Any
) -> None:
    expected = unpaged.forward({"tokens": tokens}, steps=steps)
    found = paged.forward({"tokens": tokens}, steps=steps)
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name
    assert paged.stats().peak_resident_expert_bytes <= paged.budget


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(tokens=prompts)
def test_prefill_and_decode_agree(unpaged: em.Model, tokens: list[int]) -> None:
    one, other = (
        unpaged.forward({"tokens": tokens}, steps=steps)["logits"]
        for steps in ("prefill", "decode")
    )
    # Gemm and Gemv add in another order: 1e-5 of scale leaves a factor of 30.
    assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_a_long_prompt_is_cut_into_chunks(unpaged: em.Model, monkeypatch: Any) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 50)
    whole = unpaged.forward({"tokens": tokens})
    monkeypatch.setattr("evermind_runtime.model.PREFILL_CHUNK", 7)
    chunked = unpaged.forward({"tokens": tokens})
    scale = np.abs(whole["logits"]).max()
    assert np.abs(whole["logits"] - chunked["logits"]).max() <= 1e-5 * scale


def test_generation_is_the_same_under_every_budget(lm_package: Path, unpaged: em.Model) -> None:
    least = working_set_bytes(unpaged.manifest)
    expected = [p.token for p in unpaged.generate([5, 6, 7], max_new_tokens=40, temperature=1.0)]
    for budget in (least, "25%", "50%"):
        with em.load(lm_package, budget=budget) as model:
            pieces = model.generate([5, 6, 7], max_new_tokens=40, temperature=1.0)
            assert [piece.token for piece in pieces] == expected


def test_prefill_reads_each_expert_once_per_chunk(lm_package: Path) -> None:
    with em.load(lm_package, budget="25%") as model:
        tokens = np.arange(90) % VOCABULARY
        outputs = model.forward({"tokens": tokens})
        routed = sum(len(np.unique(outputs[f"ids.{layer}"])) for layer in range(3))
        assert model.stats().expert_misses == routed


@settings(max_examples=25, deadline=None)
@given(share=st.integers(1, 100), tokens=prompts)
def test_the_budget_is_never_exceeded(lm_package: Path, share: int, tokens: list[int]) -> None:
    manifest = em.load(lm_package).manifest
    budget = max(working_set_bytes(manifest), total_expert_bytes(manifest) * share // 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = em.load(lm_package, budget=budget)
    model.forward({"tokens": tokens})
    list(model.generate(tokens, max_new_tokens=5))
    stats = model.stats()
    held = sum(slot.buffer.nbytes for slot in _all_slots(model))
    assert held == stats.resident_expert_bytes <= stats.peak_resident_expert_bytes <= budget
    assert stats.bytes_read == stats.expert_misses * manifest.kinds["relu-ffn"].bytes


def _all_slots(model: em.Model) -> list[Any]:
    return model._pager.slots.all


def test_too_small_a_budget_is_refused_with_the_number_that_does(lm_package: Path) -> None:
    least = working_set_bytes(em.load(lm_package).manifest)
    with pytest.raises(BudgetError, match=str(least)):
        em.load(lm_package, budget=least - 1)
    with em.load(lm_package, budget=least) as model:
        assert len(list(model.generate([1], max_new_tokens=3))) == 3


def test_a_thrashing_budget_is_announced(lm_package: Path) -> None:
    cycle = token_cycle_bytes(em.load(lm_package).manifest)
    with open_location(lm_package) as package:
        sizes = manifest_sizes(package.manifest)
    rate = expected_hit_rate(sizes, cycle - 1)
    expected = f"expect {rate.even:.0%} to {rate.skewed:.0%} hits with the policy 'decayed'"
    assert 0 < rate.even < rate.skewed < 1
    with pytest.warns(em.PagingWarning, match=expected):
        em.load(lm_package, budget=cycle - 1)
    none = f"expect 0% hits with the policy 'lru', and {cycle:,} bytes to be read for every token"
    with pytest.warns(em.PagingWarning, match=none):
        em.load(lm_package, budget=cycle - 1, policy="lru")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        em.load(lm_package, budget=cycle)


@pytest.mark.parametrize(
    "text", ["", "lots", "12 parsecs", "-5MiB", "%", "9" * 400 + "GB", 1.5, None.__class__, True]
)
def test_a_budget_that_is_no_size_is_refused(lm_package: Path, text: str) -> None:
    with pytest.raises(BudgetError, match="budget"):
        em.load(lm_package, budget=text)


@pytest.mark.parametrize("top_k", [1, 5])
def test_edge_top_k(tmp_path: Path, top_k: int) -> None:
    """One expert, and all of them, on odd dims and without any convolution state."""
    config = {
        "vocabSize": 7,
        "dModel": 5,
        "numLayers": 2,
        "convKernel": 1,
        "hiddenDim": 3,
        "numExperts": 5,
        "topK": top_k,
    }
    package = export(random_source("evermind-lm", config), tmp_path / "edge", dtype="f32")
    with (
        em.load(package, plan="half") as all_resident,
        em.load(package, budget=f"{20 * top_k}%") as paged,
    ):
        tokens = [1, 6, 0, 3]
        expected = all_resident.forward({"tokens": tokens}, steps="decode")
        found = paged.forward({"tokens": tokens}, steps="decode")
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
        prefill = all_resident.forward({"tokens": tokens})["logits"]
        scale = np.abs(prefill).max()
        assert np.abs(prefill - expected["logits"]).max() <= 1e-5 * scale


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("layout", ["files", "pool"])
def test_every_dtype_and_layout_passes_its_parity(tmp_path: Path, dtype: str, layout: str) -> None:
    from evermind_manifests.package import open_package
    from evermind_runtime.parity import parity_problems

    source = random_source("evermind-lm", LM_CONFIG, seed=3)
    package = export(source, tmp_path / "p.zip", dtype=dtype, layout=layout, parity=True)
    with open_package(package) as opened:
        assert parity_problems(opened) == []
