"""Regression training of one MoE layer.

Source: specs/evermind-formats.md, sections 5.2 and 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from evermind_manifests.errors import InputError

from ..models import MoeOutput, SharedExpertMoE
from .balance import load_balance_loss, peak_load
from .optimizer import OptimizerOptions, require
from .trainer import Losses, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeTrainerOptions(OptimizerOptions):
    """`batch_size` 0 takes all samples at once, in the order given.

    `aux_scale="peer"` repeats the peer's quirk: it divides the load-balancing gradient by
    the batch size a second time, so that balancing fades as batches grow.
    """

    aux_weight: float = 0.01
    aux_scale: Literal["mean", "peer"] = "mean"
    batch_size: int = 0
    epochs: int = 1

    def __post_init__(self) -> None:
        OptimizerOptions.__post_init__(self)
        require("aux_scale", self.aux_scale, self.aux_scale in ("mean", "peer"), "mean or peer")


class MoeBatch(NamedTuple):
    """`x` and `target`, both (N, D) floats; `x` is rounded to float32."""

    x: npt.NDArray[np.floating]
    target: npt.NDArray[np.floating]


class MoeEpoch(NamedTuple):
    """Mean loss over an epoch's samples; load-balancing loss of its last batch."""

    loss: float
    aux_loss: float


class MoeTrainer(Trainer[SharedExpertMoE, MoeTrainerOptions, MoeBatch]):
    """Half the squared error, summed over D and averaged over samples, plus balancing."""

    def losses(self, batch: MoeBatch) -> Losses:
        """The batch's losses with the current weights, differentiable."""
        like = self.model.router.weight
        x = torch.from_numpy(np.asarray(batch.x, dtype=np.float32)).to(like)
        target = torch.from_numpy(np.asarray(batch.target)).to(like)
        if x.ndim != 2 or x.shape != target.shape or x.shape[1] != like.shape[1] or not len(x):
            raise InputError(
                f"samples: expected x and target of shape (N, {like.shape[1]}), found "
                f"{tuple(x.shape)} and {tuple(target.shape)}"
            )
        out: MoeOutput = self.model(x)
        loss = 0.5 * (out.y - target).square().sum() / len(x)
        aux = load_balance_loss(out.probs, out.experts)
        weight = self.options.aux_weight
        if self.options.aux_scale == "peer":
            weight /= len(x)
        return Losses(loss + weight * aux, loss, aux, len(x), peak_load(out.experts, like.shape[0]))

    def train(self, samples: MoeBatch) -> list[MoeEpoch]:
        """`options.epochs` passes over the samples, never shuffled; what each epoch measured."""
        size = self.options.batch_size or len(samples.x)
        starts = range(0, len(samples.x), size) if size else range(0)
        history = []
        for _ in range(self.options.epochs):
            reports = [
                self.step(MoeBatch(samples.x[i : i + size], samples.target[i : i + size]))
                for i in starts
            ]
            if reports:
                loss = sum(r.loss * r.items for r in reports) / len(samples.x)
                history.append(MoeEpoch(loss, reports[-1].aux_loss or 0.0))
            else:
                history.append(MoeEpoch(0.0, 0.0))
        return history
