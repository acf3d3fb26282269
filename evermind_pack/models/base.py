"""What all model families have in common: a configuration, and tensors in and out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from evermind_exporters.blueprint import Tensors
from evermind_exporters.checkpoints import Family
from evermind_exporters.families import FAMILIES
from evermind_manifests.errors import CheckpointError, InputError
from torch import Tensor, nn

from .initial import initial_tensors

Array = npt.NDArray[Any]
# Inputs, in the order of `FamilyModel.inputs`, to outputs and the routes' margin, in float64.
StreamedRun: TypeAlias = Callable[..., tuple[dict[str, Tensor], float]]


class FamilyModel(nn.Module, ABC):
    """A model whose `state_dict` has exactly its family's names and shapes.

    A subclass builds its modules in `_build`, in the state dict's order and without drawing
    anything: weights come from `initial` or from a checkpoint. `inputs` names the arrays
    `run` takes, as a package's plan does.
    """

    family: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    config: dict[str, Any]

    def __init__(self, config: Mapping[str, Any]) -> None:
        """A fresh model; raises `ConfigError` for a configuration that cannot be."""
        super().__init__()
        self._prepare(config)
        self._fill(self.initial(self.config))

    @classmethod
    def from_tensors(cls, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Self:
        """A model with the given float arrays (copied) under the family's names or their aliases.

        Raises `ConfigError`, or `CheckpointError` naming what is missing, unknown or misshapen.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._prepare(config)
        model._fill(tensors)
        return model

    @classmethod
    @abstractmethod
    def initial(cls, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
        """Every tensor of a fresh model; `config` is resolved, its `seed` decides the draws."""

    @abstractmethod
    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """What a package computes from `inputs`, by the plan's names; in the model's dtype.

        Raises `InputError` for shapes or values the model does not take.
        """

    @classmethod
    def stream(cls, config: Mapping[str, Any], tensors: Tensors) -> StreamedRun | None:
        """`run` in float64 without a model in memory: tensors are read one at a time.

        None where models are small enough to be held.
        """
        return None

    def to_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of all tensors, float32, in canonical order."""
        state = self.state_dict()
        return {
            name: state[name].detach().to("cpu", torch.float32).numpy().copy()
            for name in FAMILIES[self.family].shapes(self.config)
        }

    @abstractmethod
    def _build(self) -> None:
        """Make the modules that `self.config` describes; their weights are filled in later."""

    def _prepare(self, config: Mapping[str, Any]) -> None:
        self.config = FAMILIES[self.family].resolve(config, {})
        self._build()

    def _fill(self, tensors: Mapping[str, Array]) -> None:
        # Copied: a checkpoint's arrays may be read-only views of its file.
        state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{self.family} tensors: {error}") from error


class LanguageModel(FamilyModel):
    """A model of token sequences with routed experts: what `LmTrainer` trains."""

    @classmethod
    @abstractmethod
    def with_vocabulary(cls, config: Mapping[str, Any], size: int) -> Self:
        """A fresh model of `config` for a vocabulary of `size` tokens."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens there are."""

    @property
    @abstractmethod
    def experts(self) -> int:
        """Experts in each layer."""

    @abstractmethod
    def hidden(self, tokens: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """`tokens` (B, T) int64 → what `head` takes (B, T, D), and each layer's routes.

        Those are `Routes`, or what a trainer of the family's own knows how to balance.
        """

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """(…, D) → logits (…, V)."""


class EvermindModel(FamilyModel):
    """A model of the peer's, with its initial weights."""

    family: ClassVar[Family]

    @classmethod
    def initial(cls, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
        """See `FamilyModel.initial`."""
        return initial_tensors(cls.family, config)


def rows(name: str, array: Array, width: int) -> Tensor:
    """`array` `(N, width)` in float64, as a package gets it. Raises `InputError`."""
    if array.ndim != 2 or array.shape[1] != width:
        raise InputError(f"{name}: expected shape (N, {width}), found {array.shape}")
    # Rounded to float32 first: that is what a package is given.
    return torch.from_numpy(array.astype(np.float32).astype(np.float64))


def token_row(tokens: Array, vocabulary: int) -> Tensor:
    """`tokens` (T,) integers below `vocabulary` as one row (1, T). Raises `InputError`."""
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"tokens: expected (T,) integers, found {tokens.dtype} {tokens.shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise InputError(f"tokens: expected ids from 0 to {vocabulary - 1}")
    return torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0)
