"""The Synapse expert and the pool that sums the routed ones.

Source: specs/synapse.md, sections 2.1 and 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class Expert(nn.Module):
    """`w_down(silu(w_gate x) * (w_up x))`, without biases."""

    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(d_model, d_expert, bias=False)
        self.w_up = nn.Linear(d_model, d_expert, bias=False)
        self.w_down = nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (…, d) → (…, d)."""
        y: Tensor = self.w_down(self.hidden(x))
        return y

    def hidden(self, x: Tensor) -> Tensor:
        """The F hidden values that activation sparsity is measured on: (…, d) → (…, F)."""
        hidden: Tensor = silu(self.w_gate(x)) * self.w_up(x)
        return hidden


class ExpertPool(nn.Module):
    """E experts; each runs once, on the tokens routed to it."""

    def __init__(self, d_model: int, d_expert: int, n_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(d_model, d_expert) for _ in range(n_experts))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """`x` (N, d), `indices` (N, K) int64, `weights` (N, K) → (N, d).

        An index used twice contributes twice; one that is no expert's contributes nothing.
        """
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = torch.nonzero(indices == number, as_tuple=True)
            if len(rows):
                gate = weights[rows, places].unsqueeze(-1)
                y = y.index_add(0, rows, gate * expert(x[rows]))
        return y
