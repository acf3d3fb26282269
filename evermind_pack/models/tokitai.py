"""The family `tokitai-moe`: a router and a few deep LayerNorm-GELU experts.

Source: specs/tokitai.md, section 1. All experts' arithmetic stands in `expert_forward`, which
takes its weights by name: a model in memory and one whose tensors are read one at a time
(808 million parameters need not fit) compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from evermind_exporters.blueprint import Tensors
from evermind_exporters.families.tokitai import FAMILY, expert_shapes
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from .base import Array, FamilyModel, StreamedRun, rows
from .moe_layer import smallest_gap


class TokitaiOutput(NamedTuple):
    """`logits` (N, out); `router_weights` (N, E), 0 where not routed.

    `experts` (N, k) int64, best first, `gates` (N, k) and `probs` (N, E) are the routes.
    """

    logits: Tensor
    router_weights: Tensor
    experts: Tensor
    gates: Tensor
    probs: Tensor


class TokitaiMoE(FamilyModel):
    """`x` (N, in) → `TokitaiOutput`. `config`: see `evermind_exporters.families.tokitai`."""

    family = FAMILY.name
    inputs = ("x",)

    @classmethod
    def initial(cls, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
        """See `FamilyModel.initial`."""
        return FAMILY.initial(config)

    def _build(self) -> None:
        config = self.config
        self.router = nn.Linear(config["in_dim"], config["n_experts"], device="meta")
        self.experts = nn.ModuleList(Expert(config) for _ in range(config["n_experts"]))
        self.to_empty(device="cpu")

    def forward(self, x: Tensor) -> TokitaiOutput:
        """`x` (N, in) → `TokitaiOutput`; an expert runs on the rows routed to it."""
        weights = self.router.weight, self.router.bias
        return route(self.config, x, *weights, [expert.forward for expert in self.experts])

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, in) → `logits` = `y` (T, out), `router_weights` (T, E), `ids.0`, `gates.0`."""
        return _named(self(rows("x", inputs[0], self.config["in_dim"])))

    @classmethod
    def stream(cls, config: Mapping[str, Any], tensors: Tensors) -> StreamedRun:
        """See `FamilyModel.stream`."""

        def weight(name: str) -> Tensor:
            return torch.from_numpy(tensors[name].astype(np.float64))

        def expert(number: int, x: Tensor) -> Tensor:
            return expert_forward(config, x, lambda name: weight(f"experts.{number}.{name}"))

        def run(*inputs: Array) -> tuple[dict[str, Tensor], float]:
            experts = [partial(expert, number) for number in range(config["n_experts"])]
            x = rows("x", inputs[0], config["in_dim"])
            out = route(config, x, weight("router.weight"), weight("router.bias"), experts)
            return _named(out), smallest_gap(out.probs, config["top_k"])

        return run


class Expert(nn.Module):
    """One expert; weights uninitialised."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        shapes = expert_shapes(config)
        matrices = [shape for shape in shapes.values() if len(shape) == 2]
        self.linears = nn.ModuleList(
            nn.Linear(width, out, device="meta") for out, width in matrices
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(out, config["layer_norm_eps"], device="meta") for out, _ in matrices[:-1]
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` (N, in) → (N, out)."""
        return expert_forward(self.config, x, self.get_parameter)


def expert_forward(config: Mapping[str, Any], x: Tensor, weight: Callable[[str], Tensor]) -> Tensor:
    """`x` (N, in) → (N, out), with each weight asked for by its name when it is needed."""
    approximate = "none" if config["gelu"] == "erf" else "tanh"
    last = config["depth"] + 1
    for stage in range(last):
        x = linear(x, weight(f"linears.{stage}.weight"), weight(f"linears.{stage}.bias"))
        norm = weight(f"norms.{stage}.weight"), weight(f"norms.{stage}.bias")
        x = layer_norm(x, x.shape[-1:], *norm, eps=config["layer_norm_eps"])
        x = gelu(x, approximate=approximate)
    return linear(x, weight(f"linears.{last}.weight"), weight(f"linears.{last}.bias"))


def route(
    config: Mapping[str, Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    experts: Sequence[Callable[[Tensor], Tensor]],
) -> TokitaiOutput:
    """The router, and the sum over its choices; ties go to the lower index.

    The masked probabilities are not divided by their sum, unless `renormalize` says so.
    """
    probs = torch.softmax(linear(x, weight, bias), dim=-1)
    # torch.topk promises nothing about equal values, a stable sort does.
    ranked = torch.sort(probs.detach(), dim=-1, descending=True, stable=True).indices
    chosen = ranked[:, : config["top_k"]]
    gates = probs.gather(-1, chosen)
    if config["renormalize"]:
        gates = gates / gates.sum(-1, keepdim=True)
    masked = torch.zeros_like(probs).scatter(-1, chosen, gates)
    logits = x.new_zeros(len(x), config["out_dim"])
    for number, expert in enumerate(experts):
        taken = torch.nonzero((chosen == number).any(-1)).squeeze(-1)
        if len(taken):
            part = masked[taken, number].unsqueeze(-1) * expert(x[taken])
            logits = logits.index_add(0, taken, part)
    return TokitaiOutput(logits, masked, chosen, gates, probs)


def _named(out: TokitaiOutput) -> dict[str, Tensor]:
    return {
        "logits": out.logits,
        "y": out.logits,
        "router_weights": out.router_weights,
        "ids.0": out.experts,
        "gates.0": out.gates,
    }
