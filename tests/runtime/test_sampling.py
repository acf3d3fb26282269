"""The vectorised sampler against the spec's loop, written out."""

from __future__ import annotations

import math

import numpy as np
from evermind_runtime.lcg import Lcg
from evermind_runtime.sampling import Sampler, greedy
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
    q = [float(value) / temperature for value in values]
    p = [float(np.float32(math.exp(x - max(q)))) for x in q]
    total = 0.0
    for x in p:
        total += x
    r = lcg.next() * total
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
