"""Training of the limbic model: one full-batch step an epoch.

Source: specs/evermind-formats.md, sections 7.5 and 7.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from evermind_manifests.errors import InputError
from torch import Tensor

from ..models import LimbicModel, LimbicOutput
from .optimizer import OptimizerOptions
from .trainer import Losses, StepReport, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class LimbicTrainerOptions(OptimizerOptions):
    """The peer's defaults: a higher rate than the other trainers', and clipping at norm 1."""

    lr: float = 0.05
    max_grad_norm: float | None = 1.0
    epochs: int = 50


class LimbicBatch(NamedTuple):
    """N samples: `x` (N, I), `state` (N, S), `delta` (N, S) and `reward` (N,) to be learnt."""

    x: npt.NDArray[np.floating]
    state: npt.NDArray[np.floating]
    delta: npt.NDArray[np.floating]
    reward: npt.NDArray[np.floating]


class LimbicTrainer(Trainer[LimbicModel, LimbicTrainerOptions, LimbicBatch]):
    """Every sample starts from a hidden state of zeros; nothing is carried between them."""

    def losses(self, batch: LimbicBatch) -> Losses:
        """The batch's losses with the current weights, differentiable."""
        config = self.model.config
        inputs, states = config["inputDim"], config["stateDim"]
        rows = len(batch.x)
        shapes = ((rows, inputs), (rows, states), (rows, states), (rows,))
        for name, array, shape in zip(batch._fields, batch, shapes, strict=True):
            if not rows or np.shape(array) != shape:
                raise InputError(
                    f"samples: {name}: expected shape {shape} with at least one row, found "
                    f"{np.shape(array)}"
                )
        hidden = self._tensor(np.zeros((rows, config["hiddenDim"])))
        out: LimbicOutput = self.model(
            self._tensor(batch.x, exact=False), hidden, self._tensor(batch.state, exact=False)
        )
        error = (out.delta - self._tensor(batch.delta)).square().sum()
        reward_error = (out.reward - self._tensor(batch.reward)).square().sum()
        loss = 0.5 * (error + config["rewardWeight"] * reward_error) / rows
        return Losses(loss, loss, None, rows, None)

    def train(self, samples: LimbicBatch) -> list[StepReport]:
        """`options.epochs` steps; moments and step count go on from earlier calls."""
        return [self.step(samples) for _ in range(self.options.epochs)]

    def evaluate(self, samples: LimbicBatch) -> float:
        """The mean loss without an update; 0 without samples."""
        if not len(samples.x):
            return 0.0
        with torch.no_grad():
            return self.losses(samples).loss.item()

    def _tensor(self, array: npt.NDArray[np.floating], exact: bool = True) -> Tensor:
        """In the model's dtype; inputs are rounded to float32 first, targets (`exact`) are not."""
        array = np.asarray(array, dtype=np.float64 if exact else np.float32)
        return torch.from_numpy(array).to(next(self.model.parameters()))
