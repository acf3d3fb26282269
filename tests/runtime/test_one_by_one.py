"""Large experts decode one by one: what is at hand runs first, and nothing shows that it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_runtime import open_engine

from tests.packages import export, random_source

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

# Experts of 1.5 MiB, which are read by threads.
CONFIG = {
    "vocabSize": 40,
    "dModel": 256,
    "numLayers": 3,
    "hiddenDim": 768,
    "numExperts": 8,
    "topK": 4,
}
TOKENS = {"tokens": list(range(30))}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random_source("evermind-lm", CONFIG)
    return export(source, tmp_path_factory.mktemp("large") / "lm", dtype="f32")


def load(package: Path, *, cold: bool = True, **options: Any) -> em.Model:
    """With `cold`, every read is taken for one that has to wait."""
    model = em.load(package, **options)
    if cold:
        model._pager.reader._nowait = False
    return model


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_engine, "ONE_BY_ONE_BYTES", 1 << 20)


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("budget", ["17%", "50%"])
@pytest.mark.usefixtures("one_by_one")
def test_any_budget_gives_the_same_bits(package: Path, budget: str, cold: bool) -> None:
    with load(package, plan="half") as model:
        assert model._engine.decode is model.manifest.plan.prefill
        expected = model.forward(TOKENS, steps="decode")
    with load(package, budget=budget, cold=cold) as model:
        for _ in range(3):
            found = model.forward(TOKENS, steps="decode")
            assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
        stats = model.stats()
        assert stats.peak_resident_expert_bytes <= model.budget
        assert model._pager.slots.pinned == 0


def test_the_fused_steps_compute_the_same(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(package) as fused:
        assert fused._engine.decode is fused.manifest.plan.decode
        expected = fused.forward(TOKENS, steps="decode")
    monkeypatch.setattr(open_engine, "ONE_BY_ONE_BYTES", 1)
    with load(package) as model:
        found = model.forward(TOKENS, steps="decode")
    for name, array in expected.items():
        scale = np.abs(array).max()
        # Sums in another order.
        assert np.abs(found[name] - array).max() <= 2e-6 * scale


@pytest.mark.usefixtures("one_by_one")
def test_what_was_read_meanwhile_is_a_miss(package: Path) -> None:
    """Every read serves a step here: what is not a hit was read, and once."""
    with load(package, budget="50%", guess="off") as model:
        model.forward(TOKENS, steps="decode")
        stats = model.stats()
        size = model.manifest.shards[0].bytes
        assert stats.expert_hits + stats.expert_misses == 30 * 3 * 4
        assert stats.bytes_read == stats.expert_misses * size
        pages = model._pager.pages.values()
        assert sum(one.misses for one in pages) == stats.expert_misses


@pytest.mark.usefixtures("one_by_one")
def test_what_is_at_hand_runs_before_what_is_missing(package: Path) -> None:
    with load(package, budget="50%") as model:
        pager = model._pager
        pager.routed(1, [[2, 5]])
        with pager.acquire(1, [2, 5]):
            pass
        pager.routed(1, [[0, 2, 3, 5]])
        assert pager.expect(1, [0, 2, 3, 5]) == [[2, 5], [0], [3]]
        with pager.acquire(1, [2, 5]), pager.acquire(1, [0]), pager.acquire(1, [3]):
            pass
        stats = model.stats()
        assert (stats.expert_hits, stats.expert_misses) == (2, 4)
