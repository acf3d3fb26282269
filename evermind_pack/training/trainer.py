"""What all trainers share: one optimiser step, its report, and the optimiser's state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from evermind_manifests.errors import CheckpointError
from torch import Tensor

from ..models import FamilyModel
from .optimizer import OptimizerOptions, clip_gradients, learning_rate, make_optimizer

ModelT = TypeVar("ModelT", bound=FamilyModel)
OptionsT = TypeVar("OptionsT", bound=OptimizerOptions)
BatchT = TypeVar("BatchT")

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One update: losses and gradient norm are those before it.

    `step` counts from 1; `grad_norm` is taken before clipping; `items` counts the tokens or
    rows that carried loss; `peak_load` is the busiest expert's load relative to the mean, in
    the worst layer (None without experts); `validation_loss`, where one was measured, is
    that after the update.
    """

    step: int
    loss: float
    aux_loss: float | None
    grad_norm: float
    lr: float
    items: int
    peak_load: float | None
    validation_loss: float | None = None


class Losses(NamedTuple):
    """A batch's losses: `total` is what gradients are taken of."""

    total: Tensor
    loss: Tensor
    aux_loss: Tensor | None
    items: int
    peak_load: float | None


class Trainer(ABC, Generic[ModelT, OptionsT, BatchT]):
    """A model, its optimiser and the number of updates made so far (`steps`).

    `options` may be replaced between steps; moments and step count go on. Nothing is random
    here: the same model, options and batches give the same weights.
    """

    def __init__(self, model: ModelT, options: OptionsT) -> None:
        self.model = model
        self.options = options
        self.optimizer = make_optimizer(model)
        self.steps = 0

    def step(self, batch: BatchT) -> StepReport:
        """One update from one batch."""
        options = self.options
        lr = learning_rate(options, self.steps + 1)
        for group in self.optimizer.param_groups:
            group |= {
                "lr": lr,
                "betas": (options.beta1, options.beta2),
                "eps": options.eps,
                "weight_decay": options.weight_decay,
            }
        losses = self._backward(batch)
        norm = clip_gradients(self.model.parameters(), options.max_grad_norm)
        self._update()
        return StepReport(
            step=self.steps,
            loss=losses.loss.item(),
            aux_loss=None if losses.aux_loss is None else losses.aux_loss.item(),
            grad_norm=norm,
            lr=lr,
            items=losses.items,
            peak_load=losses.peak_load,
        )

    @abstractmethod
    def losses(self, batch: BatchT) -> Losses:
        """The batch's losses with the current weights, differentiable."""

    def _backward(self, batch: BatchT) -> Losses:
        """Leave the batch's gradients in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(batch)
        torch.autograd.backward(losses.total)
        return losses

    def _update(self) -> None:
        """Move the weights by the gradients in the parameters."""
        self.optimizer.step()
        self.steps += 1

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Both moments of every parameter; empty before the first step."""
        return {
            f"{moment}.{name}": self.optimizer.state[parameter][moment]
            for name, parameter in self.model.named_parameters()
            for moment in _MOMENTS
            if parameter in self.optimizer.state
        }

    def restore(self, steps: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue after `steps` updates with the moments that `optimizer_tensors` gave.

        Raises `CheckpointError` when one is missing or misshapen.
        """
        self.steps = steps
        self.optimizer.state.clear()
        if steps == 0:
            return
        for name, parameter in self.model.named_parameters():
            state = {"step": torch.tensor(float(steps))}
            for moment in _MOMENTS:
                tensor = tensors.get(f"{moment}.{name}")
                if tensor is None or tensor.shape != parameter.shape:
                    found = "none" if tensor is None else tuple(tensor.shape)
                    raise CheckpointError(
                        f"optimizer: {moment}.{name}: expected shape {tuple(parameter.shape)}, "
                        f"found {found}"
                    )
                state[moment] = tensor.to(parameter).clone()
            self.optimizer.state[parameter] = state
