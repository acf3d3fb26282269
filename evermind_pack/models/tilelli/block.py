"""The Tilelli block: a router over pathways and banks, and the units it mixes.

Source: specs/tilelli.md, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from evermind_exporters.families.tilelli.params import BlockDims, block_dims, block_shapes
from torch import Tensor, nn

from ..base import Array, FamilyModel, rows
from ..moe_layer import smallest_gap
from .initial import initial_weights
from .pathways import make_pathway
from .ternary import TernaryLinear, TernaryWeight

_LEAST = 1e-12


class PathwayRoutes(NamedTuple):
    """What a router decided for (B, L) positions.

    `probabilities` and `kept` (B, L, pathways * banks), the second without what top-k routing
    or the threshold left out; `weights` (B, L, P) and `banks` (B, L, P) int64: each pathway's
    weight and its best bank.
    """

    probabilities: Tensor
    kept: Tensor
    weights: Tensor
    banks: Tensor


class PathwayRouter(TernaryLinear):
    """One row of `weight` for each pathway and bank, banks innermost."""

    def __init__(self, dims: BlockDims) -> None:
        options = {"quantise": dims.quantize, "per_row": dims.per_row}
        super().__init__(dims.columns, dims.d_model, **options)
        self.dims = dims

    def route(self, h: Tensor) -> PathwayRoutes:
        """`h` (B, L, d) → the routes."""
        dims = self.dims
        probabilities = super().forward(h).softmax(-1)
        kept = probabilities
        if dims.threshold > 0:
            # Compared as float32 has it, like the package's graphs.
            least = float(np.float32(dims.threshold))
            kept = torch.where(kept >= least, kept, torch.zeros_like(kept))
        elif 0 < dims.top_k_routing < dims.columns:
            best, places = kept.topk(dims.top_k_routing, dim=-1)
            kept = torch.zeros_like(kept).scatter(-1, places, best)
            kept = kept / kept.sum(-1, keepdim=True).clamp_min(_LEAST)
        by_bank = by_pathway(kept, dims.banks)
        return PathwayRoutes(probabilities, kept, by_bank.sum(-1), by_bank.argmax(-1))


class Decisions(nn.Module):
    """Passes routes on: a module of its own, so that their margin can be observed."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, routes: PathwayRoutes) -> PathwayRoutes:
        """The routes."""
        return routes

    def route_margin(self, routes: PathwayRoutes) -> float:
        """The closest of its decisions: top-k, the threshold, and every pathway's bank."""
        dims = self.dims
        margins = [math.inf]
        if dims.threshold > 0:
            margins.append(float((routes.probabilities - dims.threshold).abs().min()))
        elif 0 < dims.top_k_routing < dims.columns:
            ranked = routes.probabilities.sort(dim=-1, descending=True).values
            gaps = ranked[..., dims.top_k_routing - 1] - ranked[..., dims.top_k_routing]
            margins.append(float(gaps.min()))
        if dims.banks > 1:
            by_bank = by_pathway(routes.kept, dims.banks)
            # Where a pathway is left out all its banks are equal, and none is used.
            margins.append(smallest_gap(by_bank[routes.weights > 0], 1))
        return min(margins)


class Block(nn.Module):
    """`x` (B, L, d) → `x` plus the weighted pathways, and the routes.

    The router belongs to whoever holds the block, as the reference calls it by two names.
    """

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.dims = dims
        self.norm = nn.LayerNorm(dims.d_model, eps=1e-5)
        for pathway in dims.stored:
            banks = [make_pathway(dims, pathway) for _ in range(dims.banks)]
            setattr(self, pathway, nn.ModuleList(banks) if dims.banks > 1 else banks[0])
        self.decisions = Decisions(dims)

    def units(self, pathway: str) -> list[nn.Module]:
        """The pathway's banks."""
        module = getattr(self, pathway)
        return list(module) if isinstance(module, nn.ModuleList) else [module]

    def mix(self, x: Tensor, router: PathwayRouter) -> tuple[Tensor, PathwayRoutes, Tensor]:
        """(the block's output, the routes, the normed input)."""
        h = self.norm(x)
        routes: PathwayRoutes = self.decisions(router.route(h))
        mixed = torch.zeros_like(x)
        for at, pathway in enumerate(self.dims.pathways):
            for bank, unit in enumerate(self.units(pathway)):
                weight = routes.weights[..., at] * (routes.banks[..., at] == bank)
                mixed = mixed + weight.unsqueeze(-1) * unit(h)
        return x + mixed, routes, h


def bank_penalty(kept: Tensor, dims: BlockDims) -> Tensor:
    """How uneven the banks' weights `kept` (…, P * banks) are; 0 where there is one bank.

    The reference's auxiliary loss is a hundredth of it.
    """
    if dims.banks == 1:
        return kept.new_zeros(())
    return (kept.reshape(-1, dims.columns).mean(0) - 1 / dims.banks).square().mean()


class TilelliBlockModel(FamilyModel):
    """The module `block`: (B, L, d) → (B, L, d)."""

    family = "tilelli"
    inputs: ClassVar[tuple[str, ...]] = ("x",)

    @classmethod
    def initial(cls, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
        """See `FamilyModel.initial`."""
        return initial_weights(block_shapes(config), config["seed"])

    def forward(self, x: Tensor) -> tuple[Tensor, PathwayRoutes, Tensor]:
        """See `Block.mix`."""
        return self.block.mix(x, self.router)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, d) → the result (T, d), and everything its router says."""
        y, routes, h = self(rows("x", inputs[0], self.config["d_model"]).unsqueeze(0))
        shared = by_pathway(routes.probabilities, self.block.dims.banks).sum(-1)
        return {
            self.config["semantics"]: y[0],
            "h": h[0],
            "router_weights": shared[0],
            "router_entropy": entropy(shared)[0],
            "router_probs": routes.probabilities[0],
            "router_after_topk": routes.kept[0],
            "pathway_weights": routes.weights[0],
            **chosen(routes, 0),
        }

    def _build(self) -> None:
        dims = block_dims(self.config)
        self.block = Block(dims)
        self.router = PathwayRouter(dims)
        if self.config["weights"] == "ternary":
            use_as_they_are(self)

    def _prepare(self, config: Mapping[str, Any]) -> None:
        super()._prepare({**config, "module": "block"})

    def _fill(self, tensors: Mapping[str, Array]) -> None:
        names = {name: name if name == "router.weight" else f"block.{name}" for name in tensors}
        super()._fill({names[name]: array for name, array in tensors.items()})

    def to_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """See `FamilyModel.to_tensors`."""
        state = {name.removeprefix("block."): value for name, value in self.state_dict().items()}
        return {
            name: state[name].detach().to("cpu", torch.float32).numpy().copy()
            for name in block_shapes(self.config)
        }


def by_pathway(columns: Tensor, banks: int) -> Tensor:
    """The router's columns (…, P * banks) as (…, P, banks)."""
    return columns.reshape(*columns.shape[:-1], -1, banks)


def entropy(weights: Tensor) -> Tensor:
    """In nats: (…, P) → (…)."""
    return -(weights * weights.clamp_min(_LEAST).log()).sum(-1)


def chosen(routes: PathwayRoutes, first_layer: int) -> dict[str, Tensor]:
    """`ids.{l}` and `gates.{l}` (T, 1) of the first row's positions."""
    result = {}
    for at in range(routes.weights.shape[-1]):
        column = slice(at, at + 1)
        result[f"ids.{first_layer + at}"] = routes.banks[0, :, column]
        result[f"gates.{first_layer + at}"] = routes.weights[0, :, column]
    return result


def use_as_they_are(model: nn.Module) -> None:
    """Stop quantising: the weights of a packed checkpoint are ternary already."""
    for module in model.modules():
        if isinstance(module, TernaryWeight):
            module.quantise = False
