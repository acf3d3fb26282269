"""The family `shared-expert-moe`: one MoE layer as a model of its own.

Source: specs/evermind-formats.md, section 4.
"""

from __future__ import annotations

import re
from typing import Any

from evermind_exporters.checkpoints import dim_names
from torch import Tensor

from .base import Array, EvermindModel, rows
from .moe_layer import Experts, Ffn, MoeOutput, Router, apply_moe

# The peer's names for what packages and language models call router and experts.
_ALIAS = re.compile(r"^(?:wr$|expert(?P<index>\d+)\.)")


class SharedExpertMoE(EvermindModel):
    """`x` (N, D) → `MoeOutput`: a shared expert plus the k best of E routed ones.

    `config`: `modelDim`, `hiddenDim`, `numExperts`, `topK`, optional `seed`.
    """

    family = "shared-expert-moe"
    inputs = ("x",)

    def _build(self) -> None:
        width, hidden, experts, top_k = (self.config[name] for name in dim_names(self.family))
        self.router = Router(width, experts, top_k)
        self.shared = Ffn(width, hidden)
        self.experts = Experts(width, hidden, experts)

    def forward(self, x: Tensor) -> MoeOutput:
        """`x` (N, D) → `MoeOutput`."""
        return apply_moe(self.router, self.shared, self.experts, x)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, D) → `y` (T, D), `ids.0` and `gates.0` (T, K)."""
        out: MoeOutput = self(rows("x", inputs[0], self.config["modelDim"]))
        return {"y": out.y, "ids.0": out.experts, "gates.0": out.gates}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for key in list(state_dict):
            name = key.removeprefix(prefix)
            canonical = _ALIAS.sub(_canonical, name)
            if canonical != name:
                state_dict[prefix + canonical] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _canonical(match: re.Match[str]) -> str:
    index = match["index"]
    return "router.weight" if index is None else f"experts.{index}."
