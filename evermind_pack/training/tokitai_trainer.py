"""Training of the Tokitai classifier, and a made-up rule for it to learn.

No trainer of this family is published: cross-entropy over all outputs, with the other families'
load-balancing loss, is our choice (specs/tokitai.md, sections 3 and 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from evermind_manifests.errors import ConfigError, InputError
from torch.nn.functional import cross_entropy

from ..models import TokitaiMoE, TokitaiOutput
from .balance import load_balance_loss, peak_load
from .optimizer import OptimizerOptions
from .trainer import Losses, Trainer

# Of 96 features 22 are numbers and the others say which category (section 1).
_NUMBERS = 22
# The rule's classes: four groups of categories times three ranges of one number.
RULE_CLASSES = 12
_RANGES = np.array([-0.43, 0.43], dtype=np.float32)  # thirds of a standard normal


@dataclass(frozen=True, slots=True, kw_only=True)
class TokitaiTrainerOptions(OptimizerOptions):
    """The balancing weight is the language demo's; the rest suits a few hundred steps."""

    lr: float = 0.005
    aux_weight: float = 0.05
    max_grad_norm: float | None = 1.0


class TokitaiBatch(NamedTuple):
    """N samples: `x` (N, in) floats, rounded to float32, and the class `label` (N,) of each."""

    x: npt.NDArray[np.floating]
    label: npt.NDArray[np.integer]


class TokitaiTrainer(Trainer[TokitaiMoE, TokitaiTrainerOptions, TokitaiBatch]):
    """Mean cross-entropy of the logits with the labels, plus balancing."""

    def losses(self, batch: TokitaiBatch) -> Losses:
        """The batch's losses with the current weights, differentiable."""
        config, like = self.model.config, self.model.router.weight
        x = torch.from_numpy(np.asarray(batch.x, dtype=np.float32)).to(like)
        label = np.asarray(batch.label)
        if x.ndim != 2 or x.shape[1] != config["in_dim"] or label.shape != x.shape[:1]:
            raise InputError(
                f"samples: expected x (N, {config['in_dim']}) and label (N,), found "
                f"{tuple(x.shape)} and {label.shape}"
            )
        top = config["out_dim"] - 1
        whole = label.dtype.kind in "iu"
        if not len(x) or not whole or not 0 <= label.min() <= label.max() <= top:
            raise InputError(f"samples: label: expected classes from 0 to {top}")
        out: TokitaiOutput = self.model(x)
        loss = cross_entropy(out.logits, torch.from_numpy(label.astype(np.int64)).to(like.device))
        aux = load_balance_loss(out.probs, out.experts)
        total = loss + self.options.aux_weight * aux
        return Losses(total, loss, aux, len(x), peak_load(out.experts, like.shape[0]))

    def evaluate(self, batch: TokitaiBatch) -> float:
        """The mean loss without an update."""
        with torch.no_grad():
            return self.losses(batch).loss.item()


def rule_batch(config: Mapping[str, Any], size: int, seed: int, step: int) -> TokitaiBatch:
    """`size` samples of the made-up rule; another `step` or `seed` gives other ones.

    All features but 22 are a category, one of them 1; the others are normal numbers. The
    class is `3 * (category mod 4)`, plus which third the first number falls in. Raises
    `ConfigError` for a model with fewer than 5 inputs or 12 outputs.
    """
    width, classes = config["in_dim"], config["out_dim"]
    if width < 5 or classes < RULE_CLASSES:
        raise ConfigError(
            f"tokitai-moe config: the built-in rule takes in_dim from 5 and out_dim from "
            f"{RULE_CLASSES} up, found {width} and {classes}",
            hint="Train on samples of your own instead: --data NPZ.",
        )
    rng = np.random.default_rng([seed, step])
    categories = max(4, width - _NUMBERS)
    category = rng.integers(categories, size=size)
    numbers = rng.standard_normal((size, width - categories), dtype=np.float32)
    chosen = (np.arange(categories) == category[:, None]).astype(np.float32)
    third = np.searchsorted(_RANGES, numbers[:, 0])
    return TokitaiBatch(np.concatenate([chosen, numbers], axis=1), 3 * (category % 4) + third)
