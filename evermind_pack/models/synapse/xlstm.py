"""The Synapse xLSTM: a matrix memory with exponential gates per unit, not stabilised.

Source: specs/synapse.md, section 2.5. Without a stabiliser the memory grows by `exp(w_f x + b)`
at every token: a model whose forget gates stay above 1 ends in infinities (section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Bounds of the gates' pre-activations (section 2.5).
GATE_CLIP = 20.0


class XlstmState(NamedTuple):
    """`cell` (B, A, D, D), rows indexed by the value's unit, and `normalizer` (B, A, D)."""

    cell: Tensor
    normalizer: Tensor


class Xlstm(nn.Module):
    """`x` (B, T, d) → (B, T, d). `config` is that of the module `xlstm`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, hidden, self.heads = (config[key] for key in ("d_model", "d_hidden", "n_heads"))
        self.w_i = nn.Linear(width, hidden)
        self.w_f = nn.Linear(width, hidden)
        self.w_o = nn.Linear(width, hidden)
        self.w_k = nn.Linear(width, hidden, bias=False)
        self.w_v = nn.Linear(width, hidden, bias=False)
        self.w_q = nn.Linear(width, hidden, bias=False)
        self.w_out = nn.Linear(hidden, width, bias=False)

    def new_state(self, rows: int, like: Tensor) -> XlstmState:
        """An empty memory; the normaliser starts at one."""
        size = self.w_i.out_features // self.heads
        return XlstmState(
            like.new_zeros(rows, self.heads, size, size), like.new_ones(rows, self.heads, size)
        )

    def forward(self, x: Tensor, state: XlstmState | None = None) -> tuple[Tensor, XlstmState]:
        """The outputs and the state after them."""
        cell, normalizer = state or self.new_state(len(x), x)
        i = torch.exp(self._heads(self.w_i(x)).clamp(-GATE_CLIP, GATE_CLIP))
        f = torch.exp(self._heads(self.w_f(x)).clamp(-GATE_CLIP, GATE_CLIP))
        k, v, q = (self._heads(project(x)) for project in (self.w_k, self.w_v, self.w_q))
        ik, iv = i * k, i * v
        reads = []
        for step in range(x.shape[1]):
            now = slice(None), step
            cell = f[now].unsqueeze(-1) * cell + iv[now].unsqueeze(-1) * k[now].unsqueeze(-2)
            normalizer = f[now] * normalizer + ik[now]
            read = (cell @ q[now].unsqueeze(-1)).squeeze(-1)
            scale = (normalizer * q[now]).sum(-1, keepdim=True).abs().clamp(min=1.0)
            reads.append(read / scale)
        h = torch.stack(reads, dim=1).flatten(2)
        return self.w_out(torch.sigmoid(self.w_o(x)) * h), XlstmState(cell, normalizer)

    def _heads(self, value: Tensor) -> Tensor:
        """(B, T, H) → (B, T, A, D)."""
        return value.view(*value.shape[:-1], self.heads, -1)
