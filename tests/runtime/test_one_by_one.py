"""Large experts decode one by one: what is at hand runs first, and nothing shows that it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_runtime import devices, open_engine

from tests.packages import export, random_source
from tests.runtime.paging import same_bits

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
BIND = devices.CpuSlot.bind


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
            assert same_bits(model.forward(TOKENS, steps="decode"), expected)
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


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("bytes_from", [1, 1 << 40])
def test_a_prompt_leaves_no_misses_behind(
    package: Path, monkeypatch: pytest.MonkeyPatch, bytes_from: int, cold: bool
) -> None:
    monkeypatch.setattr(open_engine, "ONE_BY_ONE_BYTES", bytes_from)
    with load(package, plan="half", cold=cold) as model:
        state = model.new_state()
        model.forward(TOKENS, state=state)
        for token in range(10):
            model.decode({"tokens": np.array([token])}, state)
        stats = model.stats()
        assert stats.bytes_read == stats.expert_misses * model.manifest.shards[0].bytes


def test_an_interrupted_binding_is_done_again(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bytes_from in (1, 1 << 40):
        monkeypatch.setattr(open_engine, "ONE_BY_ONE_BYTES", bytes_from)
        with load(package, plan="half") as model:
            state = model.new_state()
            expected = [
                model.decode({"tokens": np.array([t])}, state)["logits"].copy() for t in range(30)
            ]
            again = model.new_state()
            model.decode({"tokens": np.array([0])}, again)
            turns = iter([False] * 7 + [True] + [False] * 10_000)

            def broken(self: Any, binding: Any, names: Any, kind: Any, turns: Any = turns) -> None:
                if not next(turns):
                    return BIND(self, binding, names, kind)
                names = list(names)
                values = self._values.get(id(kind)) or [self._view(one) for one in kind.tensors]
                binding.bind_ortvalue_input(names[0], values[0])
                raise KeyboardInterrupt

            interrupted = 0
            with monkeypatch.context() as patch:
                patch.setattr(devices.CpuSlot, "bind", broken)
                at = 1
                while at < 30:
                    mark = again.mark()
                    try:
                        found = model.decode({"tokens": np.array([at])}, again)["logits"]
                    except KeyboardInterrupt:
                        interrupted += 1
                        again.rewind(mark)
                        continue
                    np.testing.assert_array_equal(found, expected[at])
                    at += 1
            assert interrupted == 1


def test_what_is_never_verified_is_read_as_fast(package: Path) -> None:
    with load(package, budget="50%", cold=False, verify="never", guess="off") as model:
        for _ in range(2):
            model.forward(TOKENS, steps="decode")
        assert model._pager._cached >= 8


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize(("guess", "guesses"), [("auto", False), ("on", True), ("off", False)])
def test_they_are_guessed_where_it_is_asked_for(package: Path, guess: Any, guesses: bool) -> None:
    with load(package, budget="50%", guess=guess) as model:
        assert model._pager.guesses(1) == guesses
        model.forward(TOKENS, steps="decode")
        assert (model.stats().prefetches > 0) == guesses


def test_small_ones_are_guessed_by_themselves(package: Path) -> None:
    with load(package, budget="50%") as model:
        assert model._pager.guesses(1)
