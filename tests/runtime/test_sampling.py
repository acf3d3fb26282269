"""The vectorised sampler against the spec's loop, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evermind_runtime import sampling
from evermind_runtime.lcg import Lcg
from evermind_runtime.sampling import Sampler, draw, greedy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

logits = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(-30, 30, width=32),
)


def spec_sample(values: np.ndarray, temperature: float, lcg: Lcg) -> int:
    """specs/evermind-formats.md, section 8.4, one operation at a time."""
    return spec_draw(spec_weights(values, temperature), lcg.next())


def spec_weights(values: np.ndarray, temperature: float) -> list[float]:
    q = [float(value) / temperature for value in values]
    return [float(np.float32(math.exp(x - max(q)))) for x in q]


def spec_draw(p: list[float], uniform: float) -> int:
    total = 0.0
    for x in p:
        total += x
    r = uniform * total
    for i, x in enumerate(p):
        r -= x
        if r <= 0:
            return i
    return len(p) - 1


@given(values=logits, temperature=st.floats(0.05, 5), seed=st.integers(-5, 2**33))
def test_sampling_follows_the_spec(values: np.ndarray, temperature: float, seed: int) -> None:
    sampler, lcg = Sampler(temperature, seed), Lcg(seed)
    for _ in range(5):
        assert sampler.pick(values) == spec_sample(values, temperature, lcg)


@given(
    values=logits,
    temperature=st.sampled_from([1.0, 0.7]),
    at=st.integers(0, 59),
    off=st.sampled_from([0.0, 2**-53, 2**-40, 2**-24, 2**-22, 2**-20]),
    sign=st.sampled_from([-1, 1]),
)
def test_draws_on_a_boundary_follow_the_spec(
    values: np.ndarray, temperature: float, at: int, off: float, sign: int
) -> None:
    weights = spec_weights(values, temperature)
    uniform = sum(weights[: at % len(weights) + 1]) / sum(weights) + sign * off
    uniform = min(max(uniform, 0.0), 1 - 2**-53)
    assert draw(values, temperature, uniform) == spec_draw(weights, uniform)


def test_few_draws_need_the_sum_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    in_order = []

    def counted(values: np.ndarray, temperature: float, uniform: float) -> int:
        in_order.append(uniform)
        return spec_draw(spec_weights(values, temperature), uniform)

    monkeypatch.setattr(sampling, "draw_in_order", counted)
    values, lcg = np.random.default_rng(0).normal(size=1000).astype(np.float32), Lcg(3)
    weights = spec_weights(values, 1.0)
    for _ in range(500):
        uniform = lcg.next()
        assert draw(values, 1.0, uniform) == spec_draw(weights, uniform)
    assert len(in_order) < 5
    # Rounding decides here: the first boundary itself.
    draw(values, 1.0, weights[0] / sum(weights))
    assert len(in_order) >= 1


@pytest.mark.filterwarnings("ignore:invalid value")
def test_not_a_number_takes_the_last() -> None:
    assert draw(np.array([1, np.nan, 0], dtype=np.float32), 1.0, 0.1) == 2
    assert draw(np.array([np.inf, 1], dtype=np.float32), 1.0, 0.1) == 1


@pytest.mark.parametrize("shift", [-1e4, -650, -550, 550, 650, 1e4])
def test_logits_of_any_size_are_drawn_from(shift: float) -> None:
    values = np.random.default_rng(1).normal(size=200).astype(np.float32) + np.float32(shift)
    for temperature in (1.0, 0.01, 100.0):
        weights, lcg = spec_weights(values, temperature), Lcg(5)
        for _ in range(20):
            uniform = lcg.next()
            assert draw(values, temperature, uniform) == spec_draw(weights, uniform)


def test_greedy_takes_the_lowest_of_equals_and_never_nan() -> None:
    nan = float("nan")
    assert greedy(np.array([1, 3, 3], dtype=np.float32)) == 1
    assert greedy(np.array([1, nan, 0], dtype=np.float32)) == 0
    assert greedy(np.array([nan, 5], dtype=np.float32)) == 0
    assert greedy(np.array([-1, nan, 7, nan], dtype=np.float32)) == 2


def test_seed_zero_and_no_seed_are_seed_one() -> None:
    values = np.linspace(0, 1, 50, dtype=np.float32)
    picks = [[Sampler(1.0, seed).pick(values) for _ in range(3)] for seed in (None, 0, 1)]
    assert picks[0] == picks[1] == picks[2]
