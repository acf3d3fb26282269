"""State dimensions, clamping, records and set-points against the peer's."""

from __future__ import annotations

import math

import numpy as np
from evermind_runtime import limbic_state


def test_table_is_the_peers(golden):
    case = golden("limbic_regions").json
    assert list(limbic_state.DIMS) == case["dims"]
    assert [list(bounds) for bounds in limbic_state.BOUNDS] == case["bounds"]
    assert limbic_state.neutral_state().tobytes() == _f32(case["neutral_f32"])


def test_setpoints_are_the_peers(golden):
    cases = golden("limbic_regions").json["setpoints"]
    assert cases
    for case in cases:
        assert limbic_state.setpoint(case["traits"]).tobytes() == _f32(case["setpoint"]), case


def test_no_personality_is_the_neutral_state_and_nan_traits_are_average():
    assert limbic_state.setpoint(None).tolist() == limbic_state.neutral_state().tolist()
    average = limbic_state.setpoint({})
    assert average[7] == np.float32(0.4)
    assert limbic_state.setpoint({"openness": math.nan}).tolist() == average.tolist()


def test_clamping_is_the_peers(golden):
    for case in golden("limbic_regions").json["clamp_state"]:
        assert limbic_state.clamp_state(np.array(case["state"])).tobytes() == _f32(case["clamped"])


def test_clamping_leaves_further_dimensions_and_the_argument_alone():
    state = np.array([[math.nan] * 8 + [5.0, -5.0]])
    clamped = limbic_state.clamp_state(state)
    assert clamped.tolist() == [[-1.0] + [0.0] * 7 + [5.0, -5.0]]
    assert math.isnan(state[0, 0])
    assert limbic_state.clamp_state(np.array([3.0])).tolist() == [1.0]
    assert limbic_state.clamp_dim(8, 5.0) == 5.0
    assert limbic_state.clamp_dim(0, math.nan) == -1.0


def test_records_are_the_peers(golden):
    for case in golden("limbic_regions").json["record_to_state"]:
        assert limbic_state.record_to_state(case["record"]).tobytes() == _f32(case["state"])


def test_state_to_record_fills_what_is_missing_with_zero():
    record = limbic_state.state_to_record(np.array([0.5, 0.25]))
    assert record == dict.fromkeys(limbic_state.DIMS, 0.0) | {"valence": 0.5, "arousal": 0.25}
    state = limbic_state.neutral_state()
    assert limbic_state.record_to_state(limbic_state.state_to_record(state)).tolist() == (
        state.tolist()
    )


def _f32(values: list[float]) -> bytes:
    return np.array(values, dtype=np.float64).astype(np.float32).tobytes()
