"""The family `evermind-lm`: causal convolutions and MoE layers, tied embedding and head.

Source: specs/evermind-formats.md, section 8.3. Per layer:

    x = x + conv(rmsnorm(x));  x = x + MoE(rmsnorm(x))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, embedding, linear, pad

from .base import Array, EvermindModel, LanguageModel, token_row
from .moe_layer import MoeLayer, MoeOutput, Routes

RMS_EPS = 1e-5


class LmOutput(NamedTuple):
    """`logits` (B, T, V), and per layer the routes of the (B, T) positions."""

    logits: Tensor
    routes: tuple[Routes, ...]


class EvermindLM(EvermindModel, LanguageModel):
    """`tokens` (B, T) int64 → `LmOutput`; position t sees tokens 0…t.

    `config`: `vocabSize`, `dModel`, `numLayers`, `convKernel`, `hiddenDim`, `numExperts`,
    `topK`, optional `seed`.
    """

    family = "evermind-lm"
    inputs = ("tokens",)

    def _build(self) -> None:
        config = self.config
        self.token_embedding = Weight(config["vocabSize"], config["dModel"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["numLayers"]))

    @classmethod
    def with_vocabulary(cls, config: Mapping[str, Any], size: int) -> EvermindLM:
        """See `LanguageModel.with_vocabulary`."""
        return cls({**config, "vocabSize": size})

    @property
    def vocabulary(self) -> int:
        """See `LanguageModel.vocabulary`."""
        return int(self.config["vocabSize"])

    @property
    def experts(self) -> int:
        """See `LanguageModel.experts`."""
        return int(self.config["numExperts"])

    def forward(self, tokens: Tensor) -> LmOutput:
        """Logits of every position; token ids must be below `vocabSize`."""
        hidden, routes = self.hidden(tokens)
        return LmOutput(self.head(hidden), routes)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, tuple[Routes, ...]]:
        """The last layer's output (B, T, D), before the head, and the routes."""
        x = embedding(tokens, self.token_embedding.weight)
        routes = []
        for layer in self.layers:
            x, taken = layer(x)
            routes.append(taken)
        return x, tuple(routes)

    def head(self, hidden: Tensor) -> Tensor:
        """(…, D) → logits (…, V): the embedding again, without bias."""
        return linear(hidden, self.token_embedding.weight)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`tokens` (T,) integers → `logits` (T, V), and `ids.{l}`, `gates.{l}` (T, K)."""
        logits, routes = self(token_row(inputs[0], self.vocabulary))
        outputs = {"logits": logits[0]}
        for layer, taken in enumerate(routes):
            outputs |= {f"ids.{layer}": taken.experts[0], f"gates.{layer}": taken.gates[0]}
        return outputs


class Layer(nn.Module):
    """One layer of the language model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["dModel"]
        self.conv = CausalConv(width, config["convKernel"])
        self.norm_conv = RmsNorm(width)
        self.norm_moe = RmsNorm(width)
        self.moe = MoeLayer(width, config["hiddenDim"], config["numExperts"], config["topK"])

    def forward(self, x: Tensor) -> tuple[Tensor, Routes]:
        """`x` (B, T, D) → the next `x`, and the routes of its (B, T) positions."""
        x = x + self.conv(self.norm_conv(x))
        out: MoeOutput = self.moe(self.norm_moe(x).flatten(0, 1))
        y, *routes = out
        return x + y.view_as(x), Routes(*routes).unflatten(*x.shape[:2])


class Weight(nn.Module):
    """A module that holds one uninitialised `weight`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class RmsNorm(Weight):
    """`g * x / sqrt(mean(x²) + 1e-5)` over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` (…, D) → (…, D)."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS) * self.weight


class CausalConv(Weight):
    """Depthwise causal convolution; `weight` (D, C), column j is the tap with lag j."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, T, D) → (B, T, D); positions before the first count as zero."""
        if x.shape[1] == 0:
            return x  # conv1d wants at least one output position
        width, kernel = self.weight.shape
        padded = pad(x.transpose(1, 2), (kernel - 1, 0))
        # conv1d's last tap is the current position: the lags run the other way round.
        return conv1d(padded, self.weight.flip(1).unsqueeze(1), groups=width).transpose(1, 2)
