"""Next-token training of the Atome language model, straight through its ternary weights.

Source: specs/tilelli.md, sections 1 and 3. The shadow weights are what is trained and
checkpointed; every step computes with the ternary ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.tilelli import AtomeLmModel, PathwayRoutes, bank_penalty
from .lm_trainer import LmTrainer


class AtomeTrainer(LmTrainer):
    """`LmTrainerOptions.aux_weight` scales the penalty on uneven banks; the reference has 0.01."""

    def balance(
        self, routes: Sequence[PathwayRoutes], mask: Tensor
    ) -> tuple[Tensor | None, float | None]:
        """The penalty, where there are several banks; loads are not counted."""
        assert isinstance(self.model, AtomeLmModel)
        dims = self.model.dims
        if dims.banks == 1:
            return None, None
        return torch.stack([bank_penalty(taken.kept[mask], dims) for taken in routes]).mean(), None
