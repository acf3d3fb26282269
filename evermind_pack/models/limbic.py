"""The family `limbic`: a small recurrent model of affect and drives.

Source: specs/evermind-formats.md, sections 7.3 and 7.4. What the state's dimensions mean,
their bounds and where they rest stands in `evermind_runtime.limbic_state`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from evermind_exporters.checkpoints import canonical_shapes
from torch import Tensor, nn
from torch.nn.functional import linear

from .base import Array, EvermindModel, rows


class LimbicOutput(NamedTuple):
    """`hidden` (N, H); `delta` (N, S), each in (-1, 1); `reward` (N,)."""

    hidden: Tensor
    delta: Tensor
    reward: Tensor


class LimbicModel(EvermindModel):
    """One step for N independent rows; the caller integrates and clamps the state.

    `config`: `inputDim`, `hiddenDim`, `stateDim`, `rewardWeight`, optional `seed`.
    """

    family = "limbic"
    inputs = ("x", "hidden", "state")

    def _build(self) -> None:
        for name, shape in canonical_shapes(self.family, self.config).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor, hidden: Tensor, state: Tensor) -> LimbicOutput:
        """`x` (N, I), `hidden` (N, H), `state` (N, S)."""
        win, ws, a_logit, wout_state, bout_state, wout_reward, bout_reward = self.parameters()
        keep = torch.sigmoid(a_logit)
        candidate = torch.tanh(linear(x, win) + linear(state, ws))
        hidden = keep * hidden + (1 - keep) * candidate
        delta = torch.tanh(linear(hidden, wout_state, bout_state))
        reward = hidden @ wout_reward + bout_reward
        return LimbicOutput(hidden, delta, reward)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (N, I), `hidden` (N, H), `state` (N, S) → `hidden`, `delta`, `reward` (N,)."""
        widths = (self.config[name] for name in ("inputDim", "hiddenDim", "stateDim"))
        out: LimbicOutput = self(*map(rows, self.inputs, inputs, widths))
        return {"hidden": out.hidden, "delta": out.delta, "reward": out.reward}
