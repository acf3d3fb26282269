"""What all model families have in common: a configuration, and tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from evermind_exporters.checkpoints import Family, canonical_shapes, validate_config
from evermind_manifests.errors import CheckpointError
from torch import nn

from .initial import initial_tensors


class FamilyModel(nn.Module):
    """A model whose `state_dict` has exactly its family's canonical names and shapes.

    A subclass builds its modules in `_build`, in canonical order and without drawing
    anything: weights come from the peer's generator or from a checkpoint.
    """

    family: ClassVar[Family]
    config: dict[str, Any]

    def __init__(self, config: Mapping[str, Any]) -> None:
        """A fresh model; raises `ConfigError` for a configuration that cannot be."""
        super().__init__()
        self._prepare(config)
        self._fill(initial_tensors(self.family, self.config))

    @classmethod
    def from_tensors(
        cls, config: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]
    ) -> Self:
        """A model with the given float arrays (copied) under canonical names or their aliases.

        Raises `ConfigError`, or `CheckpointError` naming what is missing, unknown or misshapen.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._prepare(config)
        model._fill(tensors)
        return model

    def to_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of all tensors, float32, in canonical order."""
        state = self.state_dict()
        return {
            name: state[name].detach().to("cpu", torch.float32).numpy().copy()
            for name in canonical_shapes(self.family, self.config)
        }

    def _build(self) -> None:
        raise NotImplementedError

    def _prepare(self, config: Mapping[str, Any]) -> None:
        self.config = validate_config(self.family, config)
        self._build()

    def _fill(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        # Copied: a checkpoint's arrays may be read-only views of its file.
        state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{self.family} tensors: {error}") from error
