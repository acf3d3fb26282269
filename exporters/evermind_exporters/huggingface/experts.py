"""Which modules of a transformers model are experts, and where the checkpoint has their weights.

Nothing is known by name: transformers marks the classes it can run with another experts
implementation (`use_experts_implementation`), and its own conversion mapping tells which of the
checkpoint's tensors make up each of their parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evermind_manifests.errors import CheckpointError, UnsupportedError
from evermind_manifests.manifest import DType

from .checkpoint import Checkpoint, Rows

if TYPE_CHECKING:
    import torch

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """The experts of one layer: `path` in the model, how many, and their widths."""

    path: str
    experts: int
    width: int
    hidden: int


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Where one expert's matrices lie: gate and up `(hidden, width)`, down `(width, hidden)`."""

    gate: Rows
    up: Rows
    down: Rows


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
    if len({(one.width, one.hidden) for one in found}) > 1:
        raise UnsupportedError("experts: expected the same widths in every layer")
    return found


def _describe(path: str, module: Any) -> ExpertsModule:
    import torch

    for flag, expected in (
        ("has_gate", True),
        ("has_bias", False),
        ("is_transposed", False),
        ("is_concatenated", True),
        ("has_post_expert_norm", False),
    ):
        if getattr(module, flag, expected) is not expected:
            raise UnsupportedError(
                f"{path}: experts with {flag}={not expected} are not carried yet"
            )
    parameters = {name: tuple(one.shape) for name, one in module.named_parameters()}
    if parameters.keys() != {GATE_UP, DOWN}:
        raise UnsupportedError(
            f"{path}: expected the parameters {GATE_UP} and {DOWN}, found "
            f"{', '.join(sorted(parameters))}"
        )
    experts, width, hidden = parameters[DOWN]
    if parameters[GATE_UP] != (experts, 2 * hidden, width):
        raise UnsupportedError(
            f"{path}: {GATE_UP}: expected {(experts, 2 * hidden, width)}, found "
            f"{parameters[GATE_UP]}"
        )
    # What gates them is asked of the module itself.
    sample = torch.linspace(-9, 9, 2 * 64).reshape(1, -1)[:, torch.arange(128).roll(31) * 5 % 128]
    gate, up = sample.chunk(2, dim=-1)
    expected_gate = torch.nn.functional.silu(gate) * up
    if not torch.allclose(module._apply_gate(sample), expected_gate, rtol=1e-5, atol=1e-6):
        raise UnsupportedError(f"{path}: experts gated by anything but silu are not carried yet")
    return ExpertsModule(path, experts, width, hidden)


def map_experts(
    model: Any, modules: list[ExpertsModule], checkpoint: Checkpoint
) -> list[list[ExpertRows]]:
    """Per layer, per expert: where the checkpoint has its matrices.

    `model` is the whole transformers model (on the meta device) whose conversion mapping is
    followed. Raises `CheckpointError` where tensors are missing or have another shape.
    """
    grouped = _grouped(model, checkpoint)
    layers = []
    for module in modules:
        gate_up = _Stack(module, GATE_UP, grouped, checkpoint)
        down = _Stack(module, DOWN, grouped, checkpoint)
        hidden = module.hidden
        layers.append(
            [
                ExpertRows(
                    gate=gate_up.rows(expert, 0, hidden),
                    up=gate_up.rows(expert, hidden, 2 * hidden),
                    down=down.rows(expert, 0, module.width),
                )
                for expert in range(module.experts)
            ]
        )
    return layers


def stored_dtype(layers: list[list[ExpertRows]], checkpoint: Checkpoint) -> DType:
    """What the checkpoint stores expert weights as. Raises `UnsupportedError` for a mixture."""
    found = {
        checkpoint.dtype(rows.name)
        for experts in layers
        for one in experts
        for rows in (one.gate, one.up, one.down)
    }
    if len(found) != 1 or not found <= set(_FLOATS):
        raise UnsupportedError(
            f"experts: dtype: expected one of {', '.join(_FLOATS)} for all, found "
            f"{', '.join(sorted(found))}"
        )
    return found.pop()


def _grouped(model: Any, checkpoint: Checkpoint) -> dict[str, dict[str | None, list[str]]]:
    """Parameter → source pattern (None: as it is) → the checkpoint's tensors, in order.

    Follows how transformers itself loads: renamings, then at most one conversion.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    grouped: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(checkpoint.names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = name, None
        if not target.endswith((f".{GATE_UP}", f".{DOWN}")):
            continue
        if pattern is not None:
            known = all(
                (isinstance(step, MergeModulelist) and step.dim == 0)
                or (isinstance(step, Concatenate) and step.dim == 1)
                for step in by_pattern[pattern].operations
            )
            if not known:
                raise UnsupportedError(
                    f"{name}: transformers converts this tensor in a way that is not carried yet"
                )
            # In the order in which they are concatenated.
            for source in by_pattern[pattern].source_patterns:
                grouped.setdefault(target, {}).setdefault(source, [])
        grouped.setdefault(target, {}).setdefault(pattern, []).append(name)
    return grouped


class _Stack:
    """One parameter `(experts, rows, width)`, as the checkpoint has it."""

    def __init__(
        self,
        module: ExpertsModule,
        parameter: str,
        grouped: dict[str, dict[str | None, list[str]]],
        checkpoint: Checkpoint,
    ) -> None:
        name = f"{module.path}.{parameter}"
        found = grouped.get(name)
        if not found:
            raise CheckpointError(
                f"{checkpoint.folder}: nothing in the checkpoint becomes {name}",
                hint="Is the checkpoint complete, and of this model?",
            )
        rows, width = (
            (2 * module.hidden, module.width)
            if parameter == GATE_UP
            else (module.width, module.hidden)
        )
        self._whole: str | None = None
        self._parts: list[list[str]] = []
        if None in found:
            (self._whole,) = found[None]
            _check(checkpoint, self._whole, (module.experts, rows, width))
            return
        self._parts = list(found.values())
        self._height = rows // len(self._parts)
        for names in self._parts:
            if len(names) != module.experts:
                raise CheckpointError(
                    f"{checkpoint.folder}: {name}: expected the tensors of {module.experts} "
                    f"experts, found {len(names)}"
                )
            for one in names:
                _check(checkpoint, one, (self._height, width))

    def rows(self, expert: int, begin: int, end: int) -> Rows:
        if self._whole is not None:
            return Rows(self._whole, expert, begin, end)
        part, first = divmod(begin, self._height)
        assert first + end - begin <= self._height, "one part holds gate or up, or all of down"
        return Rows(self._parts[part][expert], None, first, first + end - begin)


def _check(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    if checkpoint.shape(name) != expected:
        raise CheckpointError(
            f"{checkpoint.folder}: {name}: shape: expected {expected}, found "
            f"{checkpoint.shape(name)}"
        )
