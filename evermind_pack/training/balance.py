"""How evenly a router spreads tokens: the load-balancing loss and the load itself.

Source: specs/evermind-formats.md, section 5.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_counts(experts: Tensor, total: int) -> Tensor:
    """`experts` (N, K) int64 → how many of the N·K places each of `total` experts got, (E,)."""
    return torch.bincount(experts.reshape(-1), minlength=total)


def load_balance_loss(probs: Tensor, experts: Tensor) -> Tensor:
    """`E * sum_e f_e * mean(probs_e)`, a scalar: 1 when even, E/K when K experts take all.

    `probs` (N, E), `experts` (N, K). `f_e`, the share of places expert e got, is a constant
    to the gradient. 0 without tokens.
    """
    if not len(probs):
        return probs.sum()
    total = probs.shape[1]
    counts = expert_counts(experts, total).to(probs.dtype)
    return total * torch.dot(counts / counts.sum(), probs.mean(0))


def peak_load(experts: Tensor, total: int) -> float:
    """The busiest expert's places relative to the mean: 1 is even, E/K is collapse."""
    counts = expert_counts(experts, total)
    return float(counts.max() * total / counts.sum().clamp(min=1))
