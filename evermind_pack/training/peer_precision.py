"""The peer's mixed precision, for parity with its traces only: never train with it.

It is a simulation. Weights and activations stay as they are; only gradients are scaled and
rounded to half, so nothing gets faster or smaller. Source: specs/evermind-formats.md, 9.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from evermind_manifests.dtypes import encode

from ..models import EvermindLM
from .lm_trainer import LmBatch, LmTrainer, LmTrainerOptions, Tokens
from .optimizer import require
from .trainer import Losses

Floats = npt.NDArray[np.float32]

# The peer's halves are infinite from here up; what lies between this and 65504 is cut to that.
_HALF_INFINITY = 65536.0


class PeerLossScaler:
    """The loss scale: backed off at every overflow, grown after `growth_interval` steps without.

    `overflows` counts the steps skipped so far. The defaults are the peer's. Raises
    `ConfigError` for settings that cannot be.
    """

    def __init__(
        self,
        initial_scale: float = 16384.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 200,
        min_scale: float = 1.0,
    ) -> None:
        for name, value, least in (
            ("min_scale", min_scale, 0.0),
            ("initial_scale", initial_scale, min_scale),
            ("growth_factor", growth_factor, 1.0),
        ):
            right = math.isfinite(value) and value > 0 and value >= least
            require(name, value, right, f"a positive number from {least:g} up")
        require("backoff_factor", backoff_factor, 0 < backoff_factor <= 1, "above 0, at most 1")
        require("growth_interval", growth_interval, growth_interval >= 1, "1 or more")
        self.scale = initial_scale
        self.overflows = 0
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._min_scale = min_scale
        self._streak = 0

    def update(self, overflow: bool) -> None:
        """Take note of a step whose gradients did, or did not, overflow."""
        if overflow:
            self.overflows += 1
            self.scale = max(self._min_scale, self.scale * self._backoff_factor)
            self._streak = 0
            return
        self._streak += 1
        if self._streak == self._growth_interval:
            self.scale *= self._growth_factor
            self._streak = 0


class PeerMixedTrainer(LmTrainer):
    """`LmTrainer` with the peer's `mixedPrecision`; a batch is one accumulation window.

    Quirk, repeated on purpose: after each sequence the peer multiplies *all* gradients
    gathered so far by the scale W. The first of n is multiplied n times, and the step is
    taken along `(W^(n-1) g1 + … + W g(n-1) + gn) / n`. Right for batches of one only.

    A step whose gradients overflow is skipped: weights, moments and `steps` stay, its report
    has the loss and a `grad_norm` that is not finite. The peer has no load balancing:
    `aux_weight` other than 0 raises `ConfigError`.
    """

    def __init__(
        self, model: EvermindLM, options: LmTrainerOptions, scaler: PeerLossScaler | None = None
    ) -> None:
        super().__init__(model, options)
        self.scaler = scaler or PeerLossScaler()
        self._overflow = False

    def _backward(self, batch: LmBatch) -> Losses:
        weight = self.options.aux_weight
        require("aux_weight", weight, weight == 0, "0: the peer has no load balancing")
        with torch.no_grad():
            losses = self.losses(batch)
        scale = self.scaler.scale
        sequences = [sequence for sequence in batch if len(sequence) >= 2]
        gradient = np.zeros(sum(p.numel() for p in self.model.parameters()), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for sequence in sequences:
                gradient = _times(gradient + self._gradient_of(sequence), scale)
            gradient = through_half(_times(gradient, 1 / len(sequences)))
            self._overflow = not np.isfinite(gradient).all()
            self._set_gradients(_times(gradient, 1 / scale))
        self.scaler.update(self._overflow)
        return losses

    def _update(self) -> None:
        if not self._overflow:
            super()._update()

    def _gradient_of(self, sequence: Sequence[int] | Tokens) -> Floats:
        """All parameters' gradients of one sequence's loss, joined; float32, as in the peer."""
        total = self.losses([sequence]).total
        gradients = torch.autograd.grad(total, list(self.model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients]).float().cpu().numpy()

    def _set_gradients(self, joined: Floats) -> None:
        parameters = list(self.model.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        parts = torch.from_numpy(joined).split_with_sizes(sizes)
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)


def _times(values: Floats, factor: float) -> Floats:
    """The float64 product, stored as float32: a float32 one differs in the last bit."""
    return np.multiply(values, factor, dtype=np.float64).astype(np.float32)


def through_half(values: Floats) -> Floats:
    """Rounded as the peer's halves are: toward zero, but to infinity from 65536 up."""
    # `encode` refuses finite values too large for a half; the peer makes them infinite.
    large = np.abs(values) >= _HALF_INFINITY
    saturated = np.where(large, np.copysign(np.float32(np.inf), values), values)
    halves: Floats = encode(saturated, "f16", "truncate").astype(np.float32)
    return halves
