"""Layers of transformers' cache that hold no keys and values. Imports transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.cache_utils import DynamicLayer


class LengthLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Knows how many tokens came before, and gives attention the new keys and values alone."""

    #: What attention gave each layer last. Not the layer's own: a trace makes layers anew, and
    #: takes the tensors that they hold for results.
    given: ClassVar[dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def __init__(self, number: int, tokens: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = number
        #: `(1, 1, tokens, 1)`: what a trace sees of the cache, and takes the length of.
        self.length = torch.zeros(1, 1, tokens, 1, device="cpu")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values, as they are."""
        self.given[self.number] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """How many tokens came before."""
        return self.length.shape[2]
