"""Experts as one opaque node of the graph that transformers exports.

transformers (5.23) keeps a registry of ways to run experts; one registered here is a single node
`evermind.Experts` of (x, ids, gates), where `cut.py` cuts the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .experts import ExpertsModule

if TYPE_CHECKING:
    import torch

DOMAIN, OPERATOR = "evermind", "Experts"
_CUT = "evermind_cut"


@contextmanager
def opaque_experts(model: Any, modules: list[ExpertsModule]) -> Iterator[None]:
    """Meanwhile the experts of `model` are opaque nodes, with the attribute `layer`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_CUT, _cut)
    for layer, one in enumerate(modules):
        model.get_submodule(one.path).evermind_layer = layer
    with experts_run_by(model, _CUT):
        yield


@contextmanager
def experts_run_by(model: Any, implementation: str) -> Iterator[None]:
    """Meanwhile transformers runs experts by `implementation`."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _cut(self: Any, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    import torch

    if not torch.compiler.is_exporting():
        return torch.zeros_like(x)  # the run that fills the sample's cache: only shapes matter
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}",
        (x, ids, gates),
        attrs={"layer": self.evermind_layer},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
