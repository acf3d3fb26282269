"""The Synapse router: a state-space context, softmax over all experts, then the top k.

Source: specs/synapse.md, section 2.3. The Hebbian strengths never change a route: they are a
statistic of the routes, `evermind_runtime.introspection` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from evermind_exporters.families.synapse.params import mamba_of
from torch import Tensor, nn

from ..moe_layer import Routes, smallest_gap
from .mamba import Mamba, MambaState


class Thalamus(nn.Module):
    """`x` (B, T, d) → routes of its positions. `config` is the model's or the module's own."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.top_k = config["top_k"]
        self.mamba = Mamba(mamba_of(config))
        self.router_proj = nn.Linear(config["d_model"], config["n_experts"])

    def forward(
        self, x: Tensor, state: MambaState | None = None
    ) -> tuple[Routes, Tensor, MambaState]:
        """The routes, the context (B, T, d) they were judged on, and the state after.

        Gates are the chosen probabilities over their sum. Ties go to the lower index: the seed's
        two implementations differ there, and `torch.topk` promises nothing.
        """
        context, state = self.mamba(x, state)
        logits = self.router_proj(context)
        probs = torch.softmax(logits, dim=-1)
        ranked = torch.sort(probs.detach(), dim=-1, descending=True, stable=True)
        experts = ranked.indices[..., : self.top_k]
        chosen = probs.gather(-1, experts)
        gates = chosen / chosen.sum(-1, keepdim=True)
        return Routes(experts, gates, probs, logits), context, state

    def route_margin(self, output: tuple[Routes, Tensor, MambaState]) -> float:
        """The smallest gap between probabilities that decided which experts, and their order."""
        return smallest_gap(output[0].probs.flatten(0, 1), self.top_k)
