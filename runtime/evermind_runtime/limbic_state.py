"""The limbic state vector: what its eight numbers mean, their bounds, and where they rest.

Source: specs/evermind-formats.md, section 7.1. The model itself never integrates the
state; a caller does `clamp_state(state + gain * delta)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

State = npt.NDArray[np.float32]

DIMS: tuple[str, ...] = (
    "valence",
    "arousal",
    "driveCuriosity",
    "driveCaution",
    "driveEffort",
    "driveSocial",
    "attention",
    "exploration",
)
BOUNDS: tuple[tuple[float, float], ...] = ((-1.0, 1.0), *((0.0, 1.0),) * 7)
NEUTRAL: tuple[float, ...] = (0.0, 0.2, 0.5, 0.5, 0.8, 0.5, 0.7, 0.5)

TRAITS: tuple[str, ...] = (
    "openness",
    "emotionality",
    "conscientiousness",
    "extraversion",
    "regulatoryFocus",
    "riskTolerance",
    "grit",
    "stimulation",
)


def neutral_state() -> State:
    """The resting state without a personality, `(8,) float32`."""
    return np.array(NEUTRAL, dtype=np.float32)


def clamp_dim(index: int, value: float) -> float:
    """`value` within the bounds of dimension `index`; NaN gives the lower bound.

    An index outside the table leaves the value as it is: a model may have more dimensions.
    """
    if not 0 <= index < len(BOUNDS):
        return value
    low, high = BOUNDS[index]
    if math.isnan(value):
        return low
    return min(max(value, low), high)


def clamp_state(state: npt.NDArray[np.floating]) -> State:
    """A clamped copy of `state` `(..., S)` as float32; only the first eight have bounds."""
    clamped = np.array(state, dtype=np.float32)
    bounded = min(clamped.shape[-1], len(BOUNDS))
    low, high = np.array(BOUNDS[:bounded], dtype=np.float32).T
    head = clamped[..., :bounded]
    # The maximum of NaN and low is low with fmax, as the bounds ask for.
    clamped[..., :bounded] = np.minimum(np.fmax(head, low), high)
    return clamped


def record_to_state(record: Mapping[str, float]) -> State:
    """The neutral state with the named dimensions set, clamped; NaN and unknown names skipped."""
    state = neutral_state()
    for index, name in enumerate(DIMS):
        value = record.get(name, math.nan)
        if not math.isnan(value):
            state[index] = clamp_dim(index, value)
    return state


def state_to_record(state: npt.NDArray[np.floating]) -> dict[str, float]:
    """Name → value for the eight dimensions; 0 where `state` `(S,)` is shorter."""
    values = [float(value) for value in state[: len(DIMS)]]
    values += [0.0] * (len(DIMS) - len(values))
    return dict(zip(DIMS, values, strict=True))


def setpoint(traits: Mapping[str, float] | None) -> State:
    """Where a personality rests, `(8,) float32`. Traits run from 0 to 100, missing or NaN is 50.

    No traits at all (`None`) is the neutral state. An empty mapping is not: the peer rests
    exploration at 0.4 there, not at the neutral 0.5.
    """
    if traits is None:
        return neutral_state()
    openness, emotion, conscience, extra, regulation, risk, grit, stimulation = (
        _centred(traits.get(name, math.nan)) for name in TRAITS
    )
    rest = (
        0.0 + 0.1 * regulation - 0.1 * emotion,
        0.2 + 0.2 * emotion + 0.1 * extra,
        0.5 + 0.35 * openness + 0.15 * stimulation,
        0.5 + 0.3 * conscience - 0.3 * risk - 0.2 * regulation + 0.15 * emotion,
        0.8 + 0.15 * grit + 0.1 * conscience,
        0.5 + 0.35 * extra,
        0.7 + 0.1 * conscience,
        0.4 + 0.3 * openness + 0.25 * risk + 0.15 * regulation,
    )
    return np.array([clamp_dim(i, value) for i, value in enumerate(rest)], dtype=np.float32)


def _centred(trait: float) -> float:
    if math.isnan(trait):
        return 0.0
    return (min(max(trait, 0.0), 100.0) - 50.0) / 50.0
