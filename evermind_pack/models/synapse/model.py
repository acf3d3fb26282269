"""The whole Synapse model: recurrent layers with a pool of routed experts each.

Source: specs/synapse.md, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from evermind_exporters.families.synapse.params import fast_weights_of, xlstm_of
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..base import Array, LanguageModel, token_row
from ..moe_layer import Routes
from .experts import ExpertPool
from .fast_weights import FastWeights
from .initial import initial_weights
from .mamba import MambaState
from .thalamus import Thalamus
from .xlstm import Xlstm, XlstmState

RMS_EPS = 1e-6


class LayerState(NamedTuple):
    """What one layer carries from call to call; `memory` is None without fast weights."""

    xlstm: XlstmState
    mamba: MambaState
    memory: Tensor | None


class RmsNorm(nn.Module):
    """`x / sqrt(mean(x²) + 1e-6) * weight` over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (…, d) → (…, d)."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS) * self.weight


class Layer(nn.Module):
    """One block: xLSTM, routed experts, memory, each behind a norm and beside a residual."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["d_model"]
        self.xlstm = Xlstm(xlstm_of(config))
        self.thalamus = Thalamus(config)
        self.experts = ExpertPool(width, config["d_expert"], config["n_experts"])
        self.memory = FastWeights(fast_weights_of(config)) if config["use_fast_weights"] else None
        self.norm1 = RmsNorm(width)
        self.norm2 = RmsNorm(width)
        self.norm3 = RmsNorm(width)

    def forward(
        self, x: Tensor, state: LayerState | None = None
    ) -> tuple[Tensor, Routes, LayerState]:
        """`x` (B, T, d) → the next `x`, the routes of its positions, and the state after."""
        language, cell = self.xlstm(self.norm1(x), state and state.xlstm)
        x = x + language
        n = self.norm2(x)
        routes, _, mamba = self.thalamus(n, state and state.mamba)
        pooled = self.experts(
            n.flatten(0, 1), routes.experts.flatten(0, 1), routes.gates.flatten(0, 1)
        )
        x = x + pooled.view_as(x)
        memory = None
        if self.memory is not None:
            # The memory's answer contains its input, and the block adds its own residual.
            read, memory = self.memory(self.norm3(x), None if state is None else state.memory)
            x = x + read
        return x, routes, LayerState(cell, mamba, memory)


class SynapseModel(LanguageModel):
    """`tokens` (B, T) int64 → logits (B, T, V), each sequence from a fresh state.

    `config`: see `evermind_exporters.families.synapse.params`.
    """

    family = "synapse"
    inputs = ("tokens",)

    @classmethod
    def initial(cls, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
        """See `FamilyModel.initial`."""
        return initial_weights(config)

    @classmethod
    def with_vocabulary(cls, config: Mapping[str, Any], size: int) -> SynapseModel:
        """See `LanguageModel.with_vocabulary`."""
        return cls({**config, "vocab_size": size})

    @property
    def vocabulary(self) -> int:
        """See `LanguageModel.vocabulary`."""
        return int(self.config["vocab_size"])

    @property
    def experts(self) -> int:
        """See `LanguageModel.experts`."""
        return int(self.config["n_experts"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position; token ids must be below `vocab_size`."""
        return self.head(self.hidden(tokens)[0])

    def hidden(self, tokens: Tensor) -> tuple[Tensor, tuple[Routes, ...]]:
        """The normalised last hidden values (B, T, D), before the head, and the routes."""
        x, routes, _ = self.steps(tokens)
        return x, routes

    def head(self, hidden: Tensor) -> Tensor:
        """(…, D) → logits (…, V)."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def steps(
        self, tokens: Tensor, states: Sequence[LayerState] | None = None
    ) -> tuple[Tensor, tuple[Routes, ...], tuple[LayerState, ...]]:
        """As `hidden`, from each layer's state, with the states after."""
        x = embedding(tokens, self.embedding.weight)
        routes, after = [], []
        for number, layer in enumerate(self.layers):
            x, taken, state = layer(x, states[number] if states else None)
            routes.append(taken)
            after.append(state)
        return self.final_norm(x), tuple(routes), tuple(after)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`tokens` (T,) integers → `logits` (T, V), and `ids.{l}`, `gates.{l}` (T, K)."""
        hidden, routes = self.hidden(token_row(inputs[0], self.vocabulary))
        outputs = {"logits": self.head(hidden)[0]}
        for layer, taken in enumerate(routes):
            outputs |= {f"ids.{layer}": taken.experts[0], f"gates.{layer}": taken.gates[0]}
        return outputs

    def _prepare(self, config: Mapping[str, Any]) -> None:
        super()._prepare({"module": "model", **config})

    def _build(self) -> None:
        width, vocabulary = self.config["d_model"], self.config["vocab_size"]
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(self.config) for _ in range(self.config["n_layers"]))
        self.final_norm = RmsNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
