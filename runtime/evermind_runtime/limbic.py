"""A limbic model in use: hidden and affective state carried from step to step.

The package computes one pure step (specs/evermind-formats.md, section 7.4) and never
integrates the state; this session does, the way the peer's callers do:
`state = clamp(state + gain * delta)`, from a personality's set-point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import InputError

from .limbic_state import clamp_state, setpoint, state_to_record
from .model import Model

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LimbicStep:
    """What one step gave: `hidden` `(H,)`, `delta` and the clamped new `state` `(S,)`, float32."""

    hidden: Vector
    delta: Vector
    reward: float
    state: Vector


class LimbicSession:
    """One agent's affect. Not thread-safe; several sessions may share a model."""

    def __init__(
        self,
        model: Model,
        *,
        traits: Mapping[str, float] | None = None,
        gain: float = 1.0,
        recovery: float = 0.0,
    ) -> None:
        """Starts at the set-point of `traits` (0 to 100 each; `None`: neutral), hidden zero.

        `gain` scales each delta. `recovery` in [0, 1] then moves the state that share of the
        way back to the set-point (0: never, as in the peer). Raises `InputError` for a model
        that is not limbic or a recovery outside its range.
        """
        plan = model.manifest.plan
        if model.manifest.family != "limbic":
            raise InputError(
                f"a limbic session needs a limbic model, not {model.manifest.family!r}"
            )
        if not 0 <= recovery <= 1:
            raise InputError(f"recovery: expected a share from 0 to 1, found {recovery}")
        self._model = model
        self._blank = model.new_state()
        self._gain = gain
        self._recovery = recovery
        self._width = plan.inputs["x"].shape[-1]
        size = model.manifest.config["stateDim"]
        rest = setpoint(traits)
        self.setpoint: Vector = np.zeros(size, dtype=np.float32)
        self.setpoint[: len(rest)] = rest[:size]
        self.hidden: Vector = np.zeros(model.manifest.config["hiddenDim"], dtype=np.float32)
        self.state: Vector = self.setpoint.copy()

    def step(self, x: npt.ArrayLike) -> LimbicStep:
        """Feel `x` `(I,)`; moves `hidden` and `state` on."""
        vector = np.asarray(x, dtype=np.float32)
        if vector.shape != (self._width,):
            raise InputError(f"x: expected shape ({self._width},), found {vector.shape}")
        outputs = self._model.decode(
            {"x": vector[None], "hidden": self.hidden[None], "state": self.state[None]},
            self._blank,
        )
        delta = outputs["delta"][0].copy()
        moved = self.state + np.float32(self._gain) * delta
        moved += np.float32(self._recovery) * (self.setpoint - moved)
        self.hidden = outputs["hidden"][0].copy()
        self.state = clamp_state(moved)
        return LimbicStep(self.hidden, delta, float(outputs["reward"][0]), self.state)

    def record(self) -> dict[str, float]:
        """The state by name: valence, arousal, the drives, attention, exploration."""
        return state_to_record(self.state)

    def reset(self) -> None:
        """Back to the set-point, hidden zero."""
        self.hidden = np.zeros_like(self.hidden)
        self.state = self.setpoint.copy()
