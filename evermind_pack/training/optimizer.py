"""AdamW, its learning-rate schedule and gradient clipping: shared by all trainers.

Source: specs/evermind-formats.md, sections 5.4 and 7.6. Both update lines of the peer are
`torch.optim.AdamW` up to rounding, with decay on every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from evermind_manifests.errors import ConfigError
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """How weights are updated. The defaults are the peer's: constant rate, no decay.

    `schedule="cosine"` falls from `lr` to 0 over `total_steps`; either schedule first rises
    linearly over `warmup_steps`. `max_grad_norm` clips the global L2 norm of the gradients.
    Raises `ConfigError` for values that cannot be.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        require("lr", self.lr, math.isfinite(self.lr) and self.lr >= 0, "a number from 0 up")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(name, beta, 0 <= beta < 1, "a number from 0 to below 1")
        require("eps", self.eps, self.eps > 0, "a positive number")
        require("weight_decay", self.weight_decay, self.weight_decay >= 0, "a number from 0 up")
        require(
            "schedule", self.schedule, self.schedule in ("constant", "cosine"), "constant or cosine"
        )
        require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        if self.schedule == "cosine":
            total = self.total_steps
            longer = total is not None and total > self.warmup_steps
            require("total_steps", total, longer, "more than warmup_steps, for a cosine")
        if self.max_grad_norm is not None:
            require("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0")


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """The rate of update number `step`, counted from 1."""
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    assert options.total_steps is not None
    length = options.total_steps - options.warmup_steps
    progress = min((step - options.warmup_steps - 1) / length, 1.0)
    return options.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW over all parameters in one group; `Trainer.step` sets the group's options."""
    return torch.optim.AdamW(model.parameters(), fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Scale all gradients by `limit / norm` when their L2 norm is above; the norm before that."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
    norm = float(torch.linalg.vector_norm(norms.double()))
    if limit is not None and norm > limit:
        _scale(gradients, limit / norm)
    return norm


def _scale(tensors: list[Tensor], factor: float) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(factor)


def require(name: str, value: object, right: bool, expected: str) -> None:
    """Raise `ConfigError` for the trainer option `name` unless it is `right`."""
    if not right:
        raise ConfigError(f"trainer options: {name}: expected {expected}, found {value!r}")
