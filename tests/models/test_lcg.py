"""The generator against the peer's states, uniforms and Gaussian draws, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from evermind_runtime.lcg import Lcg, to_uint32


def test_states_and_uniforms_are_the_peers(golden):
    for case in golden("rng").json["seeds"]:
        one_by_one = Lcg(case["seed"])
        states, uniforms = [], []
        for _ in case["states_u32"]:
            uniforms.append(one_by_one.next())
            states.append(one_by_one.state)
        assert states == case["states_u32"]
        assert uniforms == case["uniform_f64"]
        vectorised = Lcg(case["seed"])
        assert vectorised.uniforms(len(uniforms)).tolist() == uniforms
        assert vectorised.state == states[-1]


def test_gaussian_draws_are_the_peers(golden):
    for case in golden("rng").json["seeds"]:
        expected = np.array(case["gauss_std_0_02_f32"], dtype=np.float64).astype(np.float32)
        drawn = Lcg(case["seed"]).gaussian(len(expected), 0.02)
        assert drawn.tobytes() == expected.tobytes()


def test_draws_continue_the_stream_wherever_it_is_cut():
    whole = Lcg(9).gaussian(1000, 1.0)
    stream = Lcg(9)
    parts = [stream.gaussian(n, 1.0) for n in (0, 1, 499, 500)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_draws_continue_across_the_block_border():
    stream = Lcg(3)
    many = stream.gaussian((1 << 20) + 2, 1.0)
    again = Lcg(3)
    again.uniforms(2 << 20)
    assert again.gaussian(2, 1.0).tobytes() == many[-2:].tobytes()
    assert again.state == stream.state


@pytest.mark.parametrize(
    ("seed", "state"),
    [(0, 1), (0.9, 1), (-1, 2**32 - 1), (3.7, 3), (-3.7, 2**32 - 3), (2**32 + 5, 5)],
)
def test_seeds_are_taken_as_javascript_takes_them(seed, state):
    assert Lcg(seed).state == state


@pytest.mark.parametrize("seed", [float("nan"), float("inf"), float("-inf")])
def test_seeds_that_are_no_numbers_give_zero(seed):
    assert to_uint32(seed) == 0
