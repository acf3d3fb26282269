"""The Atome language model: bytes, no positions, untied ternary embeddings.

Source: specs/tilelli.md, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from evermind_exporters.families.tilelli.params import BlockDims, block_dims, lm_shapes
from torch import Tensor, nn

from ..base import Array, LanguageModel, token_row
from .block import Block, PathwayRouter, PathwayRoutes, by_pathway, chosen, entropy, use_as_they_are
from .initial import initial_weights
from .ternary import TernaryEmbedding, TernaryLinear


class AtomeOutput(NamedTuple):
    """`logits` (B, L, V), and of each layer the routes and the output (B, L, d)."""

    logits: Tensor
    routes: tuple[PathwayRoutes, ...]
    outputs: tuple[Tensor, ...]


class _Router(nn.Module):
    """The language model calls its routers' weights `router.proj.weight`."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.proj = PathwayRouter(dims)


class _Layer(Block):
    def __init__(self, dims: BlockDims) -> None:
        super().__init__(dims)
        self.router = _Router(dims)

    def forward(self, x: Tensor) -> tuple[Tensor, PathwayRoutes]:
        y, routes, _ = self.mix(x, self.router.proj)
        return y, routes


class AtomeLmModel(LanguageModel):
    """The module `lm`: `tokens` (B, L) int64 → `AtomeOutput`; position t sees tokens 0…t."""

    family = "tilelli"
    inputs: ClassVar[tuple[str, ...]] = ("tokens",)

    @classmethod
    def initial(cls, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
        """See `FamilyModel.initial`."""
        return initial_weights(lm_shapes(config), config["seed"])

    @classmethod
    def with_vocabulary(cls, config: Mapping[str, Any], size: int) -> Self:
        """See `LanguageModel.with_vocabulary`."""
        return cls({**config, "vocab_size": size})

    @property
    def vocabulary(self) -> int:
        """See `LanguageModel.vocabulary`."""
        return int(self.config["vocab_size"])

    @property
    def experts(self) -> int:
        """See `LanguageModel.experts`: the units of a layer."""
        return self.dims.columns

    @property
    def dims(self) -> BlockDims:
        """Those of every block."""
        return block_dims(self.config)

    def forward(self, tokens: Tensor) -> AtomeOutput:
        """Logits of every position; token ids must be below `vocab_size`."""
        outputs, routes = self._layers(tokens)
        return AtomeOutput(self.head(outputs[-1]), routes, outputs)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, tuple[PathwayRoutes, ...]]:
        """See `LanguageModel.hidden`."""
        outputs, routes = self._layers(tokens)
        return outputs[-1], routes

    def head(self, hidden: Tensor) -> Tensor:
        """See `LanguageModel.head`."""
        logits: Tensor = self.unembed(self.final_norm(hidden))
        return logits

    def _layers(self, tokens: Tensor) -> tuple[tuple[Tensor, ...], tuple[PathwayRoutes, ...]]:
        x = self.embed(tokens)
        outputs, routes = [], []
        for block in self.blocks:
            x, taken = block(x)
            outputs.append(x)
            routes.append(taken)
        return tuple(outputs), tuple(routes)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`tokens` (T,) → `logits` (T, V), and each block's output and routes."""
        tokens = token_row(inputs[0], self.config["vocab_size"])
        out: AtomeOutput = self(tokens)
        outputs = {"logits": out.logits[0], "embed": self.embed(tokens)[0]}
        banks, count = self.dims.banks, len(self.dims.pathways)
        for number, (routes, y) in enumerate(zip(out.routes, out.outputs, strict=True)):
            shared = by_pathway(routes.probabilities, banks).sum(-1)
            outputs |= {
                f"block{number}/forward": y[0],
                f"block{number}/router": shared[0],
                f"block{number}/entropy": entropy(shared)[0],
                **chosen(routes, number * count),
            }
        return outputs

    def _build(self) -> None:
        config, dims = self.config, block_dims(self.config)
        options = {"quantise": dims.quantize, "per_row": dims.per_row}
        self.embed = TernaryEmbedding(config["vocab_size"], dims.d_model, **options)
        self.blocks = nn.ModuleList(_Layer(dims) for _ in range(config["n_layers"]))
        self.final_norm = nn.LayerNorm(dims.d_model, eps=1e-5)
        self.unembed = TernaryLinear(config["vocab_size"], dims.d_model, **options)
        if config["weights"] == "ternary":
            use_as_they_are(self)

    def _prepare(self, config: Mapping[str, Any]) -> None:
        super()._prepare({**config, "module": "lm"})
