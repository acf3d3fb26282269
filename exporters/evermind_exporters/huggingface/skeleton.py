"""A model that can be run and traced without its weights being in memory.

Its parameters are zeros in memory that is never touched: they have addresses and shapes,
and no pages. `borrowed` puts a layer's weights in their place while that layer runs; embeddings and
the output matrix are read in rows.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from evermind_manifests.errors import UnsupportedError

from .experts import ExpertsModule
from .trunk import LARGE, Trunk

if TYPE_CHECKING:
    import torch

# Memory that is only reserved: a model larger than this machine has can still be traced.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


def skeleton(model: Any, modules: Sequence[ExpertsModule], weight_of: Callable[[str], str]) -> Any:
    """`model`, from the meta device, with untouched memory for the trunk and none for experts.

    Parameters that `weight_of` calls the same share theirs. What the model computes from its
    configuration (rotations, for one) is computed. Raises `UnsupportedError` for a buffer that is
    neither that nor in the checkpoint.
    """
    import torch

    for one in modules:
        experts = model.get_submodule(one.path)
        for name in list(experts._parameters):
            del experts._parameters[name]
    made: dict[str, torch.nn.Parameter] = {}
    computed: list[str] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name in (name for name, one in module._parameters.items() if one is not None):
            weight = weight_of(prefix + name)
            if weight not in made:
                zeros = _untouched(module._parameters[name])
                made[weight] = torch.nn.Parameter(zeros, requires_grad=False)
            module._parameters[name] = made[weight]
        for name, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            if name in module._non_persistent_buffers_set:
                module._buffers[name] = _unset(buffer)
                computed.append(prefix + name)
            else:
                module._buffers[name] = _untouched(buffer)
        # Whatever initialises a model is to fill in what it computes, and nothing else.
        module._is_hf_initialized = not module._non_persistent_buffers_set
    model.initialize_weights()
    for name in computed:
        buffer = model.get_buffer(name)
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UnsupportedError(
                f"{name}: transformers computes this buffer in a way that is not carried yet"
            )
    return model.eval()


def looked_up(model: Any) -> int:
    """The parameters of the embedding, of which a token reads a row; 0 if they serve elsewhere too,
    or the model does not say which they are.

    `model` is a skeleton.
    """
    try:
        table = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):
        return 0
    places = [one for _, one in model.named_parameters(remove_duplicate=False) if one is table]
    return int(table.numel()) if len(places) == 1 else 0


@contextmanager
def borrowed(model: Any, trunk: Trunk) -> Iterator[None]:
    """While the model runs, each of its layers has its weights, and only while it runs itself."""
    handles, piecewise = [], []
    for unit, places in _units(model):
        forward = _by_rows(unit, places, trunk)
        if forward is not None:
            unit.forward = forward
            piecewise.append(unit)
            continue
        loan = _Loan(places, trunk)
        handles.append(unit.register_forward_pre_hook(loan.lend))
        handles.append(unit.register_forward_hook(loan.take_back, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for unit in piecewise:
            del unit.forward


def _by_rows(
    unit: Any, places: Sequence[_Place], trunk: Trunk
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How to run embeddings or an output matrix without all of it; None for any other unit.

    They are the largest weights of most models.
    """
    import torch
    from torch.nn import functional

    if len(places) != 1:
        return None
    weight = trunk.name(places[0].parameter)
    if not trunk.has_rows(weight):
        return None

    def embed(ids: torch.Tensor) -> torch.Tensor:
        rows = [trunk.rows(weight, one, one + 1) for one in ids.flatten().tolist()]
        found = torch.from_numpy(np.concatenate(rows)).reshape(*ids.shape, -1)
        return found.to(unit.weight.dtype)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        out, step = unit.out_features, max(1, LARGE // unit.in_features)
        parts = []
        for begin in range(0, out, step):
            rows = torch.from_numpy(trunk.rows(weight, begin, min(begin + step, out)))
            parts.append(functional.linear(x, rows.to(unit.weight.dtype)))
        return torch.cat(parts, -1)

    if type(unit) is torch.nn.Embedding and unit.max_norm is None:
        return embed
    if type(unit) is torch.nn.Linear:
        return multiply
    return None


class _Place(NamedTuple):
    """Where a module holds a tensor: among its parameters or its buffers, and under what name."""

    parameter: str  # its path in the model
    tensors: dict[str, Any]
    name: str


class _Loan:
    """The weights of one unit, in their places between `lend` and `take_back`."""

    def __init__(self, places: list[_Place], trunk: Trunk) -> None:
        self._places = places
        self._trunk = trunk
        self._before: list[Any] = []

    def lend(self, *_: Any) -> None:
        import torch

        self._before = [one.tensors[one.name] for one in self._places]
        for one in self._places:
            weight = self._trunk.name(one.parameter)
            before = one.tensors[one.name]
            values = torch.from_numpy(self._trunk.values(weight)).to(before.dtype)
            parameter = isinstance(before, torch.nn.Parameter)
            one.tensors[one.name] = torch.nn.Parameter(values, False) if parameter else values

    def take_back(self, *_: Any) -> None:
        for one, before in zip(self._places, self._before, strict=True):
            one.tensors[one.name] = before
        self._before = []


def _units(module: torch.nn.Module, path: str = "") -> Iterator[tuple[Any, list[_Place]]]:
    """The modules whose weights are lent together, with the places of those.

    The layers of a list are one unit each; what lies outside of lists is lent module by module.
    """
    import torch

    prefix = f"{path}." if path else ""
    if own := _own(module, prefix):
        yield module, own
    for name, child in module.named_children():
        if isinstance(module, torch.nn.ModuleList):
            inner = child.named_modules(prefix=prefix + name)
            yield child, [place for below, one in inner for place in _own(one, f"{below}.")]
        else:
            yield from _units(child, prefix + name)


def _own(module: torch.nn.Module, prefix: str) -> list[_Place]:
    parameters, buffers = module._parameters, module._buffers
    own = [_Place(prefix + name, parameters, name) for name in parameters]
    own += [
        _Place(prefix + name, buffers, name)
        for name in buffers.keys() - module._non_persistent_buffers_set
    ]
    return [one for one in own if one.tensors[one.name] is not None]


def _untouched(like: torch.Tensor) -> torch.Tensor:
    import torch

    count = math.prod(like.shape)
    memory = mmap.mmap(-1, max(1, count) * like.itemsize, flags=_FLAGS)
    return torch.frombuffer(memory, dtype=like.dtype, count=count).reshape(like.shape)


def _unset(buffer: torch.Tensor) -> torch.Tensor:
    import torch

    found = torch.empty_like(buffer, device="cpu")
    return found.fill_(float("nan")) if found.is_floating_point() else found.zero_()
