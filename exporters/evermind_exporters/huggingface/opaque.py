"""Experts as one opaque node of the graph that transformers exports.

transformers (5.23) keeps a registry of ways to run experts; one registered here is a single node
`evermind.Experts` of (x, ids, gates), where `cut.py` cuts the graph. Experts that are not in the
registry have their forward replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .experts import ExpertsModule, chooser

if TYPE_CHECKING:
    import torch

DOMAIN, OPERATOR = "evermind", "Experts"
_CUT = "evermind_cut"


class _Place(NamedTuple):
    """Which of the layers with experts this is, and where a run notes how many it chose."""

    number: int
    chosen: dict[int, int]


@contextmanager
def opaque_experts(model: Any, modules: list[ExpertsModule]) -> Iterator[dict[int, int]]:
    """Meanwhile the experts of `model` are opaque nodes, with the attribute `layer`.

    Gives, after a run, by layer how many experts are chosen for a token.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_CUT, _cut)
    chosen: dict[int, int] = {}
    with ExitStack() as stack:
        for number, one in enumerate(modules):
            layer = _Place(number, chosen)
            module = model.get_submodule(one.caller)
            if one.call == "marked":
                module.evermind_layer = layer
            elif one.call == "routed":
                stack.enter_context(_forward(module, partial(_routed, layer)))
            else:
                router = chooser(model, one.caller)
                sort = _Sorted(layer, router.forward)
                stack.enter_context(_forward(router, sort.route))
                stack.enter_context(_forward(module, sort.experts))
        stack.enter_context(experts_run_by(model, modules, _CUT))
        yield chosen


@contextmanager
def experts_run_by(model: Any, modules: list[ExpertsModule], implementation: str) -> Iterator[None]:
    """Meanwhile transformers runs the experts that it marks by `implementation`."""
    if all(one.call != "marked" for one in modules):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def _forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile this instance runs `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _cut(self: Any, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return _node(self.evermind_layer, x, ids, gates)


def _routed(layer: _Place, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return _node(layer, x.reshape(-1, x.shape[-1]), ids, gates).view(x.shape)


class _Sorted:
    """Experts that take rows weighed by their scores, sorted by expert: the chosen rows alone.

    The router gives the one score that is chosen instead of all, and the layer weighs the rows of
    one expert, whichever that is for each.
    """

    def __init__(self, layer: _Place, router: Callable[..., Any]) -> None:
        self._layer = layer
        self._router = router
        self._ids: torch.Tensor | None = None

    def route(self, x: torch.Tensor) -> Any:
        """The chosen scores `(T, 1)` in the place of all, and what else the router gives."""
        scores, *rest = self._router(x)
        chosen, self._ids = scores.topk(1, dim=1)
        return chosen, *rest

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        """The chosen expert of each row."""
        import torch

        assert self._ids is not None, "the layer asks its router first"
        return _node(self._layer, x, self._ids, torch.ones_like(self._ids, dtype=x.dtype))


def _node(layer: _Place, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    import torch

    if not torch.compiler.is_exporting():  # a run of which only shapes matter
        layer.chosen[layer.number] = ids.shape[-1]
        return torch.zeros_like(x)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}",
        (x, ids, gates),
        attrs={"layer": layer.number},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
