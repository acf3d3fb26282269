"""What transformers' exporter cannot translate yet, rewritten in operators that it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

_BACKEND = "onnx"


@contextmanager
def fixes(model: Any) -> Iterator[None]:
    """Meanwhile transformers' exporter applies these to the graphs that it exports of `model`."""
    from transformers.exporters import utils

    registry: Any = utils
    registry.register_fx_node_fix(_BACKEND)(_unsqueeze_complex)
    rotaries = [one for one in model.modules() if type(one).__name__ == "PhimoeRotaryEmbedding"]
    try:
        for one in rotaries:
            one.forward = partial(_phimoe_rotations, one)
        with _sums_apart_from_norms(model):
            yield
    finally:
        for one in rotaries:
            vars(one).pop("forward", None)
        registry._FX_NODE_FIXES[_BACKEND].remove(_unsqueeze_complex)


@contextmanager
def _sums_apart_from_norms(model: Any) -> Iterator[None]:
    """Meanwhile no sum is fused with the norm behind it, if that has weights of another dtype.

    ONNX Runtime has no such operator, and transformers (5.23), which takes the two apart again,
    forgets the bias of the sum.
    """
    from onnxscript.rewriter.ort_fusions import _core
    from transformers.exporters import onnxruntime_fusions

    core: Any = _core
    fusions: Any = onnxruntime_fusions
    fuse, steps = core.fuse_skip_rms_normalization, fusions._STEPS
    if len({one.dtype for one in model.parameters() if one.ndim == 1}) > 1:
        core.fuse_skip_rms_normalization = lambda *_, **__: 0
        fusions._STEPS = tuple(step for step in steps if step[0] is not fuse)
    try:
        yield
    finally:
        core.fuse_skip_rms_normalization = fuse
        fusions._STEPS = steps


def _phimoe_rotations(module: Any, x: Any, position_ids: Any) -> tuple[Any, Any]:
    """Cosines and sines `(1, T, width)`; longrope's magnitude is chosen within the graph.

    transformers (5.23) branches on the last position, which a trace cannot.
    """
    import torch

    rope = module.config.rope_parameters
    frequencies, scale = module.rope_init_fn(module.config)
    if rope["rope_type"] != "default":
        beyond = position_ids.max() >= rope["original_max_position_embeddings"]
        scale = torch.where(beyond, rope["long_mscale"], rope["short_mscale"])
    half = position_ids[..., None].float() * frequencies
    angles = torch.cat((half, half), dim=-1)
    return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


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
