"""The five pathways: normed inputs (B, L, d) to contributions (B, L, d), causal, no biases.

Source: specs/tilelli.md, section 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from evermind_exporters.families.tilelli.params import BlockDims
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from .ternary import TernaryConv, TernaryLinear


class DiagonalState(nn.Module):
    """`s_t = tanh(a_raw) s_{t-1} + b h_t`, `y_t = c_out s_t`; never quantised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a_raw, self.b, self.c_out = (nn.Parameter(torch.empty(width)) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        """`h` (B, L, d) → (B, L, d)."""
        decay, s, span = torch.tanh(self.a_raw), self.b * h, 1
        # Sums over the last 1, 2, 4, … tokens: log L steps instead of L.
        while span < h.shape[1]:
            s = s + decay * pad(s[:, :-span], (0, 0, span, 0))
            decay, span = decay.square(), 2 * span
        return self.c_out * s


class Best(NamedTuple):
    """`kept` (B, L, k) and their places; `scores` (B, L, L) is -inf at later tokens."""

    kept: Tensor
    places: Tensor
    scores: Tensor


class BestScores(nn.Module):
    """Keeps each query's best scores: a module of its own, as its choices decide results."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, scores: Tensor) -> Best:
        """`scores` (B, L, L) → the best `min(top_k, L)` of each row."""
        kept, places = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1)
        return Best(kept, places, scores)

    def route_margin(self, best: Best) -> float:
        """The smallest gap between a row's last score that is kept and its first that is not."""
        if best.scores.shape[-1] <= self.top_k:
            return math.inf
        ranked = best.scores.sort(dim=-1, descending=True).values
        gaps = ranked[..., self.top_k - 1] - ranked[..., self.top_k]
        gaps = gaps[gaps.isfinite()]
        return float(gaps.min()) if gaps.numel() else math.inf


class SparseAttention(nn.Module):
    """One causal head over the `top_k` best scores, without an output projection."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()

        def projection(rows: int) -> TernaryLinear:
            quantise = dims.quantised("Wq.weight")
            return TernaryLinear(rows, dims.d_model, quantise=quantise, per_row=dims.per_row)

        self.Wq, self.Wk = projection(dims.d_head), projection(dims.d_head)
        self.Wv = projection(dims.d_model)
        self.best = BestScores(dims.top_k)
        self.scale = 1 / math.sqrt(dims.d_head)

    def forward(self, h: Tensor) -> Tensor:
        """`h` (B, L, d) → (B, L, d)."""
        scores = self.Wq(h) @ self.Wk(h).transpose(1, 2) * self.scale
        length = h.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
        best: Best = self.best(scores.masked_fill(later, -math.inf))
        weights = torch.zeros_like(scores).scatter(-1, best.places, best.kept.softmax(-1))
        mixed: Tensor = weights @ self.Wv(h)
        return mixed


class Dense(nn.Module):
    """`down(gelu(up h))` with the exact GELU: the one pathway that sees a token alone."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        hidden = dims.expand * dims.d_model
        options = {"quantise": dims.quantize, "per_row": dims.per_row}
        self.up = TernaryLinear(hidden, dims.d_model, **options)
        self.down = TernaryLinear(dims.d_model, hidden, **options)

    def forward(self, h: Tensor) -> Tensor:
        """`h` (B, L, d) → (B, L, d)."""
        y: Tensor = self.down(gelu(self.up(h)))
        return y


def make_pathway(dims: BlockDims, pathway: str) -> nn.Module:
    """One unit of a pathway, uninitialised."""
    if pathway == "state":
        return DiagonalState(dims.d_model)
    if pathway == "sparse":
        return SparseAttention(dims)
    if pathway == "dense":
        return Dense(dims)
    kernel = dims.kernel if pathway == "local" else dims.wide
    return TernaryConv(dims.d_model, 1, kernel, quantise=dims.quantize, per_row=dims.per_row)
