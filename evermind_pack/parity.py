"""The torch models as the independent implementation behind a package's parity file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from evermind_exporters.blueprint import Tensors
from evermind_exporters.family import Arrays
from evermind_exporters.parity import Reference
from torch import nn

from .models import FamilyModel, model_type
from .models.base import StreamedRun
from .models.reference import as_arrays, ordered, reference


@runtime_checkable
class Routing(Protocol):
    """A torch module whose output decides routes."""

    def route_margin(self, output: Any) -> float:
        """By how much its closest decision was decided."""


def parity_reference(family: str) -> Reference:
    """What `export_package` wants as `reference`: float64 outputs, and the routes' margin."""

    def bind(config: Mapping[str, Any], tensors: Tensors) -> Callable[[Arrays], Arrays]:
        kind = model_type(family, config)
        if streamed := kind.stream(config, tensors):
            return _stream(kind, streamed)
        model = kind.from_tensors(config, tensors).double()

        def run(inputs: Arrays) -> Arrays:
            margins: list[float] = []

            def record(module: nn.Module, _inputs: Any, output: Any) -> None:
                assert isinstance(module, Routing)
                margins.append(module.route_margin(output))

            # The model runs as a copy, which has the hooks too.
            hooks = [
                module.register_forward_hook(record)
                for module in model.modules()
                if isinstance(module, Routing)
            ]
            try:
                outputs = reference(model, inputs)
            finally:
                for hook in hooks:
                    hook.remove()
            return outputs | {"margin": np.array(min(margins, default=np.inf))}

        return run

    return bind


def _stream(kind: type[FamilyModel], streamed: StreamedRun) -> Callable[[Arrays], Arrays]:
    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            outputs, margin = streamed(*ordered(kind.inputs, inputs))
        return as_arrays(outputs) | {"margin": np.array(margin)}

    return run
