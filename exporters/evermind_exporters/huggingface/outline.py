"""What an import would make of a model, from its `config.json` alone, as transformers has it.

The model is made as an import makes it, without memory for weights, and run once with matrices
that give zeros: that tells its experts, how many are chosen, and what it keeps of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import StateSpec

from ..reason import reason
from .experts import ExpertsModule, find_experts
from .quiet import quiet
from .skeleton import looked_up, skeleton
from .trace import empty_model, look


@dataclass(frozen=True, slots=True)
class Outline:
    """A model's experts, weights and states.

    `modules` are the layers with experts and `top_k` how many of each a token chooses. `trunk`
    are the shapes of all other weights; those named in `linear` multiply, and a quantised
    checkpoint has codes for them. `looked_up` counts the parameters of which a token reads a row.
    """

    modules: tuple[ExpertsModule, ...]
    top_k: tuple[int, ...]
    trunk: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]
    looked_up: int
    states: tuple[StateSpec, ...]


def outline(config: Path) -> Outline:
    """The model of a `config.json`.

    Raises `UnsupportedError` for one that transformers cannot make or run, or that is not
    carried, `ImportError` where transformers or PyTorch is not installed.
    """
    try:
        with quiet():
            return _outline(config)
    except (UnsupportedError, ImportError):
        raise
    except Exception as error:  # a configuration may be wrong in any way
        raise UnsupportedError(
            f"{config}: transformers cannot make a model of this: {reason(error)}"
        ) from error


def _outline(config: Path) -> Outline:
    import torch

    empty = empty_model(config)
    modules = find_experts(empty)
    ties: Mapping[str, str] = empty.all_tied_weights_keys
    experts = tuple(f"{one.path}." for one in modules)
    trunk = {
        name: tuple(one.shape)
        for name, one in empty.state_dict().items()
        if not name.startswith(experts) and name not in ties
    }
    model = skeleton(empty, modules, lambda name: ties.get(name, name))
    text = model.config.get_text_config()
    with _zeros(model):
        seen = look(model, modules, getattr(text, "max_position_embeddings", None))
    head = model.get_output_embeddings()
    linear = {
        f"{path}.weight"
        for path, one in model.named_modules()
        if type(one) is torch.nn.Linear and one is not head
    }
    return Outline(
        modules=tuple(modules),
        top_k=seen.top_k,
        trunk=trunk,
        linear=frozenset(linear & trunk.keys()),
        looked_up=looked_up(model),
        states=seen.states,
    )


@contextmanager
def _zeros(model: Any) -> Iterator[None]:
    """Meanwhile matrices give what they give with weights that are zeros, and read none."""
    import torch

    units: list[Any] = [one for one in model.modules() if type(one) is torch.nn.Linear]

    def zeros(width: int) -> Any:
        return lambda x: x.new_zeros(*x.shape[:-1], width)

    for one in units:
        one.forward = zeros(one.out_features)
    try:
        yield
    finally:
        for one in units:
            del one.forward
