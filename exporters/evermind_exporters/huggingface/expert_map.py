"""Where a checkpoint has each expert's weights: transformers' own conversion mapping, followed.

The mapping tells which of the checkpoint's tensors become which parameter of the model: a stack
of all experts of a layer, or a tensor (gate and up: two) for each expert.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from evermind_manifests.dtypes import FLOATS
from evermind_manifests.errors import CheckpointError, UnsupportedError
from evermind_manifests.manifest import DType

from .checkpoint import Checkpoint, Rows
from .conversion import Conversion
from .experts import ExpertsModule, Parameter

#: One expert's tensors in a shard's order, and where each lies in the checkpoint.
ExpertRows: TypeAlias = dict[str, Rows]


def map_experts(
    model: Any, modules: list[ExpertsModule], checkpoint: Checkpoint
) -> list[list[ExpertRows]]:
    """Per layer, per expert: where the checkpoint has its tensors.

    `model` is the whole transformers model (on the meta device) whose conversion mapping is
    followed. Raises `CheckpointError` where tensors are missing or have another shape.
    """
    parameters = {f"{one.path}.{part.name}" for one in modules for part in one.parameters}
    grouped = _grouped(model, checkpoint, parameters)
    layers = []
    for module in modules:
        stacks = [(part, _Stack(module, part, grouped, checkpoint)) for part in module.parameters]
        layers.append(
            [
                {
                    tensor: stack.rows(expert, number)
                    for part, stack in stacks
                    for number, tensor in enumerate(part.tensors)
                }
                for expert in range(module.experts)
            ]
        )
    return layers


def stored_dtypes(
    layers: list[list[ExpertRows]], checkpoint: Checkpoint, wanted: DType | None
) -> list[dict[str, DType]]:
    """For each layer, what its shards' tensors are stored as: `wanted`, or the checkpoint's.

    Raises `UnsupportedError` for what are no floats, or not the same in all experts of a layer.
    """
    result: list[dict[str, DType]] = []
    for experts in layers:
        types: dict[str, DType] = {}
        for tensor in experts[0]:
            found = {checkpoint.dtype(rows[tensor].name) for rows in experts}
            if len(found) != 1 or not found <= FLOATS:
                raise UnsupportedError(
                    f"experts: {tensor}: dtype: expected one of {', '.join(sorted(FLOATS))} for "
                    f"all of a layer, found {', '.join(sorted(found))}"
                )
            types[tensor] = wanted or found.pop()
        result.append(types)
    return result


def _grouped(
    model: Any, checkpoint: Checkpoint, parameters: set[str]
) -> dict[str, dict[str | None, list[str]]]:
    """Parameter → source pattern → the tensors that match it, in their natural order.

    The pattern is None where a tensor becomes the parameter as it is.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    conversion = Conversion(model, checkpoint)
    by_pattern = conversion.converters
    grouped: dict[str, dict[str | None, list[str]]] = {}
    for name, target, pattern in conversion.renamed:
        if target not in parameters:
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
    """One parameter, as the checkpoint has it: in one tensor, or in some for each expert."""

    def __init__(
        self,
        module: ExpertsModule,
        part: Parameter,
        grouped: dict[str, dict[str | None, list[str]]],
        checkpoint: Checkpoint,
    ) -> None:
        name = f"{module.path}.{part.name}"
        found = grouped.get(name)
        if not found:
            raise CheckpointError(
                f"{checkpoint.folder}: nothing in the checkpoint becomes {name}",
                hint="Is the checkpoint complete, and of this model?",
            )
        self._part = part
        shapes = [module.tensors[tensor] for tensor in part.tensors]
        self._ends = [sum(one[0] for one in shapes[: n + 1]) for n in range(len(shapes))]
        rest = shapes[0][1:]
        self._whole: str | None = None
        self._sources: list[list[str]] = []
        self._height: int | None = None
        if None in found:
            (self._whole,) = found[None]
            shape = module.stack_shape(part)
            _check(checkpoint, self._whole, shape)
            self._height = shape[0] // module.experts if part.flat else None
            return
        self._sources = list(found.values())
        if len(self._sources) not in (1, len(shapes)) or (part.transposed and rest):
            raise UnsupportedError(
                f"{name}: expected the checkpoint's tensors to be whole matrices of one expert"
            )
        height = self._ends[-1] // len(self._sources)
        self._source_height = height
        for names in self._sources:
            if len(names) != module.experts:
                raise CheckpointError(
                    f"{checkpoint.folder}: {name}: expected the tensors of {module.experts} "
                    f"experts, found {len(names)}"
                )
            for one in names:
                _check(checkpoint, one, (height, *rest))

    def rows(self, expert: int, number: int) -> Rows:
        """Where `expert` has the part's tensor `number`."""
        begin, end = self._ends[number - 1] if number else 0, self._ends[number]
        if self._whole is None:
            source, first = divmod(begin, self._source_height)
            return Rows(self._sources[source][expert], None, first, first + end - begin)
        return Rows(self._whole, expert, begin, end, self._part.transposed, self._height)


def _check(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    if checkpoint.shape(name) != expected:
        raise CheckpointError(
            f"{checkpoint.folder}: {name}: shape: expected {expected}, found "
            f"{checkpoint.shape(name)}"
        )
