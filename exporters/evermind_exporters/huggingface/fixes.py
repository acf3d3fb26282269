"""What transformers' exporter cannot translate yet, rewritten in operators that it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_BACKEND = "onnx"


@contextmanager
def fixes() -> Iterator[None]:
    """Meanwhile transformers' exporter applies these to the graphs that it exports."""
    from transformers.exporters import utils

    registry: Any = utils
    registry.register_fx_node_fix(_BACKEND)(_unsqueeze_complex)
    try:
        yield
    finally:
        registry._FX_NODE_FIXES[_BACKEND].remove(_unsqueeze_complex)


def _unsqueeze_complex(module: Any, node: Any) -> bool:
    """A complex tensor gets its new dimension as pairs of reals (rotations indexed with `None`)."""
    import torch

    aten = torch.ops.aten
    if node.target is not aten.unsqueeze.default or not node.args[0].meta["val"].is_complex():
        return False
    source, dim = node.args
    rank = node.args[0].meta["val"].ndim + 1
    value = source.meta["val"]
    new = source
    with module.graph.inserting_before(node):
        for target, args in (
            (aten.view_as_real.default, ()),
            (aten.unsqueeze.default, (dim % rank,)),
            (aten.view_as_complex.default, ()),
        ):
            new = module.graph.call_function(target, args=(new, *args))
            value = target(value, *args)
            new.meta["val"] = value
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    return True
