"""Each Synapse module as a model of its own: what its package is compared with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from evermind_manifests.errors import InputError
from torch import Tensor, nn

from ..base import Array, FamilyModel, rows
from .experts import Expert, ExpertPool
from .fast_weights import FastWeights
from .initial import initial_weights
from .mamba import Mamba
from .thalamus import Thalamus
from .xlstm import Xlstm


class SynapseModule(FamilyModel):
    """A model whose one submodule, `core`, has the published names."""

    family = "synapse"
    inputs: ClassVar[tuple[str, ...]] = ("x",)
    module: ClassVar[str]
    core: nn.Module

    @classmethod
    def initial(cls, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
        """See `FamilyModel.initial`."""
        return initial_weights(config)

    def to_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """See `FamilyModel.to_tensors`."""
        return {
            name: tensor.detach().to("cpu", torch.float32).numpy().copy()
            for name, tensor in self.core.state_dict().items()
        }

    def _prepare(self, config: Mapping[str, Any]) -> None:
        super()._prepare({**config, "module": self.module})

    def _fill(self, tensors: Mapping[str, Array]) -> None:
        super()._fill({f"core.{name}": array for name, array in tensors.items()})

    def _build(self) -> None:
        self.core = self._core()

    @abstractmethod
    def _core(self) -> nn.Module: ...

    def _x(self, x: Array) -> Tensor:
        return rows("x", x, self.config["d_model"])


class SynapseExpert(SynapseModule):
    """The module `expert`."""

    module = "expert"

    def _core(self) -> nn.Module:
        return Expert(self.config["d_model"], self.config["d_expert"])

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, d) → `y` (T, d)."""
        return {"y": self.core(self._x(inputs[0]))}


class SynapsePool(SynapseModule):
    """The module `pool`."""

    module = "pool"
    inputs = ("x", "expert_indices", "routing_weights")

    def _core(self) -> nn.Module:
        return ExpertPool(*(self.config[name] for name in ("d_model", "d_expert", "n_experts")))

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, d), `expert_indices` (T, K) integers, `routing_weights` (T, K) → `y` (T, d)."""
        x, indices, weights = inputs
        top_k = self.config["top_k"]
        if indices.shape != (len(x), top_k) or indices.dtype.kind not in "iu":
            raise InputError(
                f"expert_indices: expected ({len(x)}, {top_k}) integers, found {indices.dtype} "
                f"{indices.shape}"
            )
        gates = rows("routing_weights", weights, top_k)
        return {"y": self.core(self._x(x), torch.from_numpy(indices.astype(np.int64)), gates)}


class SynapseMamba(SynapseModule):
    """The module `mamba`."""

    module = "mamba"

    def _core(self) -> nn.Module:
        return Mamba(self.config)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, d) → `y` (T, d), `ssm_state` (N, S)."""
        y, state = self.core(self._x(inputs[0]).unsqueeze(0))
        return {"y": y[0], "ssm_state": state.ssm[0]}


class SynapseThalamus(SynapseModule):
    """The module `thalamus`."""

    module = "thalamus"

    def _core(self) -> nn.Module:
        return Thalamus(self.config)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, d) → the routes (`expert_indices`, `routing_weights`, `routing_probs`),
        `context` (T, d), `ssm_state` (N, S)."""
        routes, context, state = self.core(self._x(inputs[0]).unsqueeze(0))
        return {
            "expert_indices": routes.experts[0],
            "routing_weights": routes.gates[0],
            "routing_probs": routes.probs[0],
            "context": context[0],
            "ssm_state": state.ssm[0],
        }


class SynapseXlstm(SynapseModule):
    """The module `xlstm`."""

    module = "xlstm"

    def _core(self) -> nn.Module:
        return Xlstm(self.config)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, d) → `y` (T, d), `cell_state` (A, D, D), `normalizer_state` (A, D)."""
        y, state = self.core(self._x(inputs[0]).unsqueeze(0))
        return {
            "y": y[0],
            "cell_state": state.cell[0],
            "normalizer_state": state.normalizer[0],
        }


class SynapseFastWeights(SynapseModule):
    """The module `fast_weights`."""

    module = "fast_weights"

    def _core(self) -> nn.Module:
        return FastWeights(self.config)

    def run(self, *inputs: Array) -> dict[str, Tensor]:
        """`x` (T, d) → `y` (T, d), `fast_weights` (M, d_key, d_value)."""
        y, memory = self.core(self._x(inputs[0]).unsqueeze(0))
        return {"y": y[0], "fast_weights": memory[0]}


MODULES: tuple[type[SynapseModule], ...] = (
    SynapseExpert,
    SynapsePool,
    SynapseMamba,
    SynapseThalamus,
    SynapseXlstm,
    SynapseFastWeights,
)
