"""Weights that are used in ternary form and trained through it.

The parameter is the shadow weight in float32; what a module computes with is `alpha * trits`.
Gradients pass straight through to the shadow weight. Source: specs/tilelli.md, section 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, linear, pad

SMALLEST_ALPHA = 1e-5


def ternarise(weight: Tensor, *, per_row: bool) -> Tensor:
    """`alpha * trits` of `weight`, in its dtype; alpha and trits as float32 gives them."""
    shadow = weight.float()
    rows = shadow.abs().reshape(len(shadow) if per_row else 1, -1)
    alpha = rows.double().mean(dim=1).float().clamp_min(SMALLEST_ALPHA)
    alpha = alpha.reshape(-1, *[1] * (weight.dim() - 1))
    trits = (shadow / alpha).round().clamp(-1, 1)
    return (alpha * trits).to(weight.dtype)


class TernaryWeight(nn.Module):
    """A module with one `weight`, quantised where it is used, or as it is (`quantise` False)."""

    def __init__(self, *shape: int, quantise: bool, per_row: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.quantise = quantise
        self.per_row = per_row

    def used(self) -> Tensor:
        """The weight computed with, differentiable with respect to the shadow weight."""
        if not self.quantise:
            return self.weight
        used = ternarise(self.weight.detach(), per_row=self.per_row)
        if not torch.is_grad_enabled():
            return used
        return self.weight + (used - self.weight).detach()


class TernaryLinear(TernaryWeight):
    """`x W^T`, `weight` (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` (…, in) → (…, out)."""
        return linear(x, self.used())


class TernaryEmbedding(TernaryWeight):
    """The rows of `weight` (V, d)."""

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` (…) int64 → (…, d)."""
        return self.used()[ids]


class TernaryConv(TernaryWeight):
    """Depthwise causal convolution, `weight` (d, 1, k); the last tap is the current token's."""

    def forward(self, h: Tensor) -> Tensor:
        """`h` (B, L, d) → (B, L, d)."""
        width, _, kernel = self.weight.shape
        padded = pad(h.transpose(1, 2), (kernel - 1, 0))
        return conv1d(padded, self.used(), groups=width).transpose(1, 2)
