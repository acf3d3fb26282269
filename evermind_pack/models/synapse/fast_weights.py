"""The Synapse fast-weight memory: read, then write, a decaying matrix per head.

Source: specs/synapse.md, section 2.6. In the seed all rows of a batch read one memory that row
0 writes; here every sequence has its own, which for one sequence is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FastWeights(nn.Module):
    """`x` (B, T, d) → `x` plus what the memory gives. `config`: the module `fast_weights`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, self.heads = config["d_model"], config["n_heads"]
        self.d_key, self.d_value = config["d_key"], config["d_value"]
        self.decay, self.strength = config["decay"], config["write_strength"]
        self.w_key = nn.Linear(width, self.heads * self.d_key, bias=False)
        self.w_value = nn.Linear(width, self.heads * self.d_value, bias=False)
        self.w_query = nn.Linear(width, self.heads * self.d_key, bias=False)
        self.w_gate = nn.Linear(width, self.heads, bias=False)
        self.w_out = nn.Linear(self.heads * self.d_value, width, bias=False)

    def new_state(self, rows: int, like: Tensor) -> Tensor:
        """An empty memory (B, M, d_key, d_value)."""
        return like.new_zeros(rows, self.heads, self.d_key, self.d_value)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The outputs and the memory after them."""
        memory = self.new_state(len(x), x) if memory is None else memory
        keys, values, queries = (
            project(x).unflatten(-1, (self.heads, -1))
            for project in (self.w_key, self.w_value, self.w_query)
        )
        gated = self.strength * torch.sigmoid(self.w_gate(x)).unsqueeze(-1) * values
        reads = []
        for step in range(x.shape[1]):
            now = slice(None), step
            reads.append((memory * queries[now].unsqueeze(-1)).sum(-2))
            memory = self.decay * memory + keys[now].unsqueeze(-1) * gated[now].unsqueeze(-2)
        return x + self.w_out(torch.stack(reads, dim=1).flatten(2)), memory
