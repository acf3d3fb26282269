"""The torch models as the independent implementation behind a package's parity file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from evermind_exporters.blueprint import Tensors
from evermind_exporters.checkpoints import Family
from torch import Tensor, nn

from .models import MODELS
from .models.moe_layer import Router, Routes
from .models.reference import reference

Arrays = dict[str, npt.NDArray[Any]]


def parity_reference(
    family: Family,
) -> Callable[[Mapping[str, Any], Tensors], Callable[[Arrays], Arrays]]:
    """What `export_package` wants as `reference`: float64 outputs, and the routes' margin."""

    def bind(config: Mapping[str, Any], tensors: Tensors) -> Callable[[Arrays], Arrays]:
        model = MODELS[family].from_tensors(config, tensors).double()

        def run(inputs: Arrays) -> Arrays:
            gaps: list[float] = []
            hooks = [
                module.register_forward_hook(_gap_recorder(gaps))
                for module in model.modules()
                if isinstance(module, Router)
            ]
            try:
                outputs = reference(model, inputs)
            finally:
                for hook in hooks:
                    hook.remove()
            return outputs | {"margin": np.array(min(gaps, default=np.inf))}

        return run

    return bind


def _gap_recorder(gaps: list[float]) -> Callable[[nn.Module, Any, Routes], None]:
    """Notes the smallest difference between logits that decided which experts, and their order."""

    def record(router: nn.Module, _inputs: Any, routes: Routes) -> None:
        assert isinstance(router, Router)
        ranked: Tensor = torch.sort(routes.logits, dim=-1, descending=True).values
        decided = ranked[:, : router.top_k + 1]
        gaps.append(
            float((decided[:, :-1] - decided[:, 1:]).min()) if decided.shape[1] > 1 else np.inf
        )

    return record
