"""Which modules of a transformers model are experts, and what one of them is made of.

Nothing is known by name: transformers marks the classes it can run with another experts
implementation (`use_experts_implementation`), with flags that say how their weights lie and what
they do. A layer's experts become shards of tensors `(out, in)`, each with its bias: gate and up
apart where they lie one after the other, as one where they are interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from evermind_manifests.errors import UnsupportedError

from ..families.synapse.params import EXPERT_TENSORS

if TYPE_CHECKING:
    import torch

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
BIAS: Final = "_bias"


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
    """The experts of one layer: `path` in the model, how many, and what one consists of.

    An expert takes and gives rows of `width`. `tensors` are a shard's, with their shapes.
    `swiglu`: it computes `w_down(silu(w_gate x) * w_up x)`.
    """

    path: str
    experts: int
    width: int
    tensors: dict[str, tuple[int, ...]]
    parameters: tuple[Parameter, ...]
    swiglu: bool

    @property
    def scalars(self) -> int:
        """Parameters of one expert."""
        total = 0
        for shape in self.tensors.values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total

    def stack_shape(self, part: Parameter) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        shapes = [self.tensors[name] for name in part.tensors]
        rows, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
        if part.flat:
            return (self.experts * rows, *rest)
        return (self.experts, *((*rest, rows) if part.transposed else (rows, *rest)))


def is_experts(module: torch.nn.Module) -> bool:
    """Whether transformers can give this module another experts implementation."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def find_experts(model: torch.nn.Module) -> list[ExpertsModule]:
    """The experts of every layer, in order; `model` may lie on the meta device.

    Raises `UnsupportedError` where there are none, or they are of a form that is not carried.
    """
    found = [_describe(path, one) for path, one in model.named_modules() if is_experts(one)]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__}: expected layers with experts that transformers can replace, "
            "found none",
            hint="The model is dense, or its experts are written in another way.",
        )
    return found


def has_post_norm(module: Any) -> bool:
    """Whether what each expert gives is normalised before it is weighed."""
    return bool(getattr(module, "has_post_expert_norm", False))


def _describe(path: str, module: Any) -> ExpertsModule:
    found = {name: tuple(one.shape) for name, one in module.named_parameters()}
    first = GATE_UP if module.has_gate else UP
    matrices = [first, DOWN]
    expected = {*matrices, *(name + BIAS for name in matrices if module.has_bias)}
    if found.keys() != expected or any(len(found[name]) != 3 for name in matrices):
        raise UnsupportedError(
            f"{path}: expected the parameters {', '.join(sorted(expected))}, matrices for every "
            f"expert, found {', '.join(f'{name} {shape}' for name, shape in sorted(found.items()))}"
        )
    transposed = bool(module.is_transposed)
    split = module.has_gate and module.is_concatenated
    parameters: list[Parameter] = []
    tensors: dict[str, tuple[int, ...]] = {}
    for name in matrices:
        names = _tensor_names(name, split)
        experts, rows, width = found[name]
        if transposed:
            rows, width = width, rows
        if rows % len(names):
            raise UnsupportedError(f"{path}: {name}: expected an even number of rows, found {rows}")
        parameters.append(Parameter(name, names, transposed))
        tensors |= {one: (rows // len(names), width) for one in names}
        if module.has_bias:
            biases = tuple(one.replace("w_", "b_", 1) for one in names)
            parameters.append(Parameter(name + BIAS, biases))
            tensors |= {one: (rows // len(names),) for one in biases}
    swiglu = split and not module.has_bias and not has_post_norm(module) and _is_swiglu(module)
    described = ExpertsModule(
        path, experts, tensors["w_down"][0], tensors, tuple(parameters), swiglu
    )
    for part in parameters:
        if found[part.name] != described.stack_shape(part):
            raise UnsupportedError(
                f"{path}: {part.name}: expected {described.stack_shape(part)}, found "
                f"{found[part.name]}"
            )
    return described


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
    return bool(torch.allclose(module._apply_gate(sample), expected, rtol=1e-5, atol=1e-6))
