"""Which modules of a transformers model are experts, and what one of them is made of.

Nothing is known by name: transformers marks the classes it can run with another experts
implementation (`use_experts_implementation`), with flags that say how their weights lie and what
they do; others are recognised by what they take and hold (`_unmarked`). A layer's experts become
shards of tensors `(out, in)`, each with its bias: gate and up apart where they lie one after the
other, as one where they are interleaved.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from evermind_manifests.errors import UnsupportedError

from ..families.synapse.params import EXPERT_TENSORS
from .matrices import uses

if TYPE_CHECKING:
    import torch

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
BIAS: Final = "_bias"

#: How a layer calls its experts. "marked" and "routed": with rows, their experts and gates, the
#: first by transformers' registry. "sorted": with rows weighed and sorted by expert already.
Call: TypeAlias = Literal["marked", "routed", "sorted"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the module: which of a shard's tensors make up an expert's part of it.

    They follow each other along its rows, or, `transposed`, along its columns. `flat`: experts
    lie one below the other in a matrix, not stacked.
    """

    name: str
    tensors: tuple[str, ...]
    transposed: bool = False
    flat: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """The experts of one layer: `path` of the module that has their weights, and how many.

    `caller` is the path of the one that the layer calls. An expert takes and gives rows of
    `width`. `tensors` are a shard's, with their shapes. `swiglu`: an expert computes
    `w_down(silu(w_gate x) * w_up x)`.
    """

    path: str
    caller: str
    call: Call
    experts: int
    width: int
    tensors: dict[str, tuple[int, ...]]
    parameters: tuple[Parameter, ...]
    swiglu: bool = False

    @property
    def scalars(self) -> int:
        """Parameters of one expert."""
        return sum(map(math.prod, self.tensors.values()))

    def stack_shape(self, part: Parameter) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        shapes = [self.tensors[name] for name in part.tensors]
        rows, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
        shape = (*rest, rows) if part.transposed else (rows, *rest)
        return (self.experts * shape[0], *shape[1:]) if part.flat else (self.experts, *shape)


class _Flags(NamedTuple):
    """What transformers' marks say of experts."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool


def find_experts(model: torch.nn.Module) -> list[ExpertsModule]:
    """The experts of every layer, in order; `model` may lie on the meta device.

    Raises `UnsupportedError` where there are none, or they are of a form that is not carried.
    """
    found = []
    for path, module in model.named_modules():
        described = _marked(path, module) or _unmarked(path, module, model)
        if described:
            found.append(described)
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__}: expected layers with experts that transformers can replace, "
            "or that take rows and hold their weights in stacks; found none",
            hint="The model is dense, or its experts are written in another way.",
        )
    return found


def has_post_norm(module: Any) -> bool:
    """Whether what each expert gives is normalised before it is weighed."""
    return bool(getattr(module, "has_post_expert_norm", False))


def apply_gate(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    """What the experts do between their layers: their own, or what transformers does by default."""
    if hasattr(module, "_apply_gate"):
        own: torch.Tensor = module._apply_gate(gate_up)
        return own
    gate, up = gate_up.chunk(2, dim=-1)
    default: torch.Tensor = module.act_fn(gate) * up
    return default


def _marked(path: str, module: Any) -> ExpertsModule | None:
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
        return None
    flags = _Flags(*(bool(getattr(module, name)) for name in _Flags._fields))
    return _described(path, module, flags, "marked")


def _unmarked(path: str, module: Any, model: Any) -> ExpertsModule | None:
    """Experts that transformers does not mark, by what they hold and take."""
    experts = getattr(module, "num_experts", None)
    if not isinstance(experts, int):
        return None
    shapes = _shapes(module)
    taken = len(inspect.signature(module.forward).parameters)
    if not shapes and taken == 3:
        return _unstacked(path, module, experts)
    if shapes.keys() != {GATE_UP, DOWN} or any(
        len(shape) != 3 or shape[0] != experts for shape in shapes.values()
    ):
        return None
    _, rows, width = shapes[GATE_UP]
    flags = _Flags(True, False, shapes[DOWN][1:] == (width // 2, rows), True)
    if taken == 3:
        return _described(path, module, flags, "routed")
    if taken != 1:
        return None
    if (chosen := getattr(chooser(model, path), "top_k", None)) != 1:
        raise UnsupportedError(
            f"{path}: experts whose inputs are weighed, {chosen} of them for each token: only one "
            "is carried"
        )
    return _described(path, module, flags, "sorted")


def chooser(model: Any, path: str) -> Any:
    """The router beside the experts at `path`: it knows how many there are and how many to take."""
    parent = model.get_submodule(path.rpartition(".")[0])
    experts = model.get_submodule(path)
    for one in parent.children():
        if one is not experts and getattr(one, "num_experts", None) == experts.num_experts:
            return one
    raise UnsupportedError(f"{path}: expected a router beside these experts, found none")


def _described(path: str, module: Any, flags: _Flags, call: Call) -> ExpertsModule:
    """By transformers' flags."""
    found = _shapes(module)
    matrices = [GATE_UP if flags.has_gate else UP, DOWN]
    expected = {*matrices, *(name + BIAS for name in matrices if flags.has_bias)}
    if found.keys() != expected or any(len(found[name]) != 3 for name in matrices):
        raise UnsupportedError(
            f"{path}: expected the parameters {', '.join(sorted(expected))}, matrices for every "
            f"expert, found {', '.join(f'{name} {shape}' for name, shape in sorted(found.items()))}"
        )
    split = flags.has_gate and flags.is_concatenated
    parameters: list[Parameter] = []
    tensors: dict[str, tuple[int, ...]] = {}
    for name in matrices:
        names = _tensor_names(name, split)
        experts, rows, width = found[name]
        if flags.is_transposed:
            rows, width = width, rows
        if rows % len(names):
            raise UnsupportedError(f"{path}: {name}: expected an even number of rows, found {rows}")
        parameters.append(Parameter(name, names, flags.is_transposed))
        tensors |= {one: (rows // len(names), width) for one in names}
        if flags.has_bias:
            biases = tuple(one.replace("w_", "b_", 1) for one in names)
            parameters.append(Parameter(name + BIAS, biases))
            tensors |= {one: (rows // len(names),) for one in biases}
    plain = split and not flags.has_bias and not has_post_norm(module)
    described = ExpertsModule(
        path,
        path,
        call,
        experts,
        tensors["w_down"][0],
        tensors,
        tuple(parameters),
        plain and _is_swiglu(module),
    )
    for part in parameters:
        if found[part.name] != described.stack_shape(part):
            raise UnsupportedError(
                f"{path}: {part.name}: expected {described.stack_shape(part)}, found "
                f"{found[part.name]}"
            )
    return described


def _unstacked(path: str, module: Any, experts: int) -> ExpertsModule | None:
    """Experts one below the other in matrices of a module inside, which computes with one's."""
    inside = [(name, one) for name, one in module.named_modules() if _shapes(one)]
    if len(inside) != 1:
        return None
    name, holder = inside[0]
    shapes = _shapes(holder)
    if len(inspect.signature(holder.forward).parameters) != 1 + len(shapes) or any(
        len(shape) != 2 or shape[0] % experts for shape in shapes.values()
    ):
        return None
    matrices = {one: (rows // experts, width) for one, (rows, width) in shapes.items()}
    width = next(iter(matrices.values()))[1]
    used = uses(holder, matrices, width)
    return ExpertsModule(
        f"{path}.{name}",
        path,
        "routed",
        experts,
        width,
        {one: tuple(reversed(matrices[one])) if used[one] else matrices[one] for one in matrices},
        tuple(Parameter(one, (one,), used[one], flat=True) for one in matrices),
    )


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Of the module's own parameters."""
    return {name: tuple(one.shape) for name, one in module.named_parameters(recurse=False)}


def _tensor_names(parameter: str, split: bool) -> tuple[str, ...]:
    gate, up, down = EXPERT_TENSORS
    if parameter == DOWN:
        return (down,)
    if parameter == UP:
        return (up,)
    return (gate, up) if split else ("w_gate_up",)


def _is_swiglu(module: Any) -> bool:
    """What gates them is asked of the module itself, at values that any clamp would change."""
    import torch

    ramp = torch.cat([torch.linspace(-9, 9, 120), torch.tensor([-1e4, -300, -30, -10.0])])
    ramp = torch.cat([ramp, -ramp[-4:]])
    sample = ramp[None, torch.arange(128).roll(31) * 5 % 128]
    gate, up = sample.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    return bool(torch.allclose(apply_gate(module, sample), expected, rtol=1e-5, atol=1e-6))
