"""Next-token training of a language model, a batch of sequences a step.

Source: specs/evermind-formats.md, sections 9.1 and 9.2. A batch of n sequences is what the
peer reaches by accumulating n. Unlike the peer's, this trainer balances its routers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from evermind_manifests.errors import InputError
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..models import LanguageModel
from .balance import load_balance_loss, peak_load
from .optimizer import OptimizerOptions
from .trainer import Losses, Trainer

Tokens = npt.NDArray[np.integer]
LmBatch = Sequence[Sequence[int] | Tokens] | Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LmTrainerOptions(OptimizerOptions):
    """`aux_weight` scales the load-balancing loss, averaged over layers; the peer has none (0).

    `epochs` and `batch_size` are for `LmTrainer.train`; `batch_size` is the peer's `accumSteps`.
    """

    aux_weight: float = 0.01
    epochs: int = 1
    batch_size: int = 1


class LmTrainer(Trainer[LanguageModel, LmTrainerOptions, LmBatch]):
    """Cross-entropy averaged within each sequence, then over sequences, plus balancing."""

    def losses(self, batch: LmBatch) -> Losses:
        """The batch's losses with the current weights, differentiable.

        `batch`: token ids, (B, T) or ragged; sequences shorter than 2 count for nothing.
        Raises `InputError` when none is left, or for an id outside the vocabulary.
        """
        tokens, mask = self._padded(batch)
        hidden, routes = self.model.hidden(tokens[:, :-1])
        # Positions in padding carry no loss and do not count for the balance.
        nll = cross_entropy(self.model.head(hidden[mask]), tokens[:, 1:][mask], reduction="none")
        weights = mask.double() / (mask.sum(dim=1, keepdim=True) * len(mask))
        loss = torch.dot(nll, weights[mask].to(nll))
        aux, load = self.balance(routes, mask)
        total = loss if aux is None else loss + self.options.aux_weight * aux
        return Losses(total, loss, aux, int(mask.sum()), load)

    def balance(self, routes: Sequence[Any], mask: Tensor) -> tuple[Tensor | None, float | None]:
        """The balancing loss and the busiest expert's load at the positions of `mask`."""
        total = self.model.experts
        chosen = [taken.experts[mask] for taken in routes]
        aux = torch.stack(
            [
                load_balance_loss(taken.probs[mask], experts)
                for taken, experts in zip(routes, chosen, strict=True)
            ]
        ).mean()
        return aux, max(peak_load(experts, total) for experts in chosen)

    def train(self, sequences: LmBatch) -> list[float]:
        """`options.epochs` passes in the given order; each epoch's mean loss over sequences."""
        usable = [sequence for sequence in sequences if len(sequence) >= 2]
        return [self._epoch(usable) for _ in range(self.options.epochs)]

    def evaluate(self, batches: Iterable[LmBatch]) -> float:
        """The mean loss over batches, without balancing and without an update."""
        with torch.no_grad():
            losses = [self.losses(batch).loss.item() for batch in batches]
        return math.fsum(losses) / len(losses)

    def _epoch(self, sequences: LmBatch) -> float:
        size = max(self.options.batch_size, 1)
        losses = []
        for start in range(0, len(sequences), size):
            batch = sequences[start : start + size]
            losses += [self.step(batch).loss] * len(batch)
        return math.fsum(losses) / len(losses) if losses else 0.0

    def _padded(self, batch: LmBatch) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) int64, zeros after a sequence's end; mask (B, T-1) of what has a target."""
        usable = [np.asarray(sequence) for sequence in batch if len(sequence) >= 2]
        if not usable:
            raise InputError("batch: expected a sequence of at least 2 tokens, found none")
        lengths = np.array([len(sequence) for sequence in usable])
        tokens = np.zeros((len(usable), lengths.max()), dtype=np.int64)
        for row, sequence in zip(tokens, usable, strict=True):
            row[: len(sequence)] = sequence
        vocabulary = self.model.vocabulary
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise InputError(f"batch: expected token ids from 0 to {vocabulary - 1}")
        mask = np.arange(tokens.shape[1] - 1) < (lengths - 1)[:, None]
        device = next(self.model.parameters()).device
        return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)
