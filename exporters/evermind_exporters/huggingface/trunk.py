"""The trunk of a checkpoint: every weight but the experts', read when it is asked for.

Weights go by the names of the model's parameters. Most are one tensor of the checkpoint, bit for
bit; of a tensor that transformers converts, the converted values are taken in its own dtype.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from evermind_manifests import dtypes
from evermind_manifests.errors import CheckpointError, ConfigError, ContentError, UnsupportedError
from evermind_manifests.manifest import DType

from ..resident import Stored
from .checkpoint import Checkpoint
from .conversion import Conversion
from .experts import ExpertsModule

if TYPE_CHECKING:
    import torch

#: How an import is told to store weights.
ImportDType: TypeAlias = Literal["keep", "f16", "bf16", "f32"]

#: Values of the matrices that are worth keeping in half precision: fewer, and a graph that
#: computes in float32 holds them in it anyway. Also how many are read at a time.
LARGE = 512 * 1024


def wanted_dtype(option: str, value: ImportDType) -> DType | None:
    """What weights are to be stored as, or None to keep them. Raises `ConfigError`."""
    if value not in get_args(ImportDType):
        raise ConfigError(
            f"{option}: expected one of {', '.join(get_args(ImportDType))}, found {value!r}"
        )
    return None if value == "keep" else value


def trunk_dtype(kept: DType, shape: tuple[int, ...], wanted: DType | None) -> DType:
    """What a weight in `kept` is stored as; see `Trunk` for what is wanted."""
    if wanted is None or (wanted != "f32" and math.prod(shape) < LARGE):
        return kept
    return wanted


class Converted(NamedTuple):
    """A parameter that transformers makes of other tensors: what it asks its converter."""

    pattern: str
    sources: tuple[tuple[str, str], ...]  # (source pattern, tensor), in order
    first: str  # the first of the parameters that the converter gives


@dataclass(frozen=True, slots=True)
class _Weight:
    source: str | Converted
    found: DType
    stored: DType
    shape: tuple[int, ...]


class Trunk:
    """The weights of a model that no expert holds, as `dtype` has them stored.

    `dtype` None keeps them bit for bit; "f32" widens all; "f16" and "bf16" round those of
    `LARGE` values and more, and keep the others.
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[ExpertsModule],
        checkpoint: Checkpoint,
        dtype: DType | None = None,
    ) -> None:
        """`model` is the whole model, on the meta device.

        Raises `CheckpointError` where a weight is missing or of another shape,
        `UnsupportedError` for one stored as anything but a float.
        """
        self._model = model
        self._checkpoint = checkpoint
        self._conversion = Conversion(model, checkpoint)
        paths = tuple(f"{one.path}." for one in modules)
        parameters = {
            name: tuple(one.shape)
            for name, one in model.state_dict().items()
            if not name.startswith(paths)
        }
        sources = self._sources(parameters)
        self._aliases = self._ties(sources, parameters)
        missing = sorted(parameters.keys() - sources.keys() - self._aliases.keys())
        if missing:
            raise CheckpointError(
                f"{checkpoint.folder}: {len(missing)} weights are missing: "
                f"{', '.join(missing[:5])}",
                hint="Is the checkpoint complete, and of this model?",
            )
        self._weights = {
            name: self._weight(name, source, parameters[name], dtype)
            for name, source in sources.items()
            if name not in self._aliases
        }

    @property
    def weights(self) -> dict[str, Stored]:
        """What every weight is stored as."""
        return {name: Stored(one.stored, one.shape) for name, one in self._weights.items()}

    @property
    def names(self) -> Set[str]:
        """Every parameter that is a weight, also those that share another's."""
        return self._weights.keys() | self._aliases.keys()

    @property
    def parameters(self) -> int:
        """Scalars of all weights together."""
        return sum(math.prod(one.shape) for one in self._weights.values())

    def name(self, parameter: str) -> str:
        """The weight that a parameter is: its own, or the one it is tied to."""
        return self._aliases.get(parameter, parameter)

    def read(self, weight: str) -> Iterator[npt.NDArray[Any]]:
        """A weight's values as they are stored, in order, in flat arrays of at most `LARGE`.

        Raises `ContentError` where a finite value would become infinite.
        """
        one = self._weights[weight]
        for block in self._blocks(weight):
            if one.found == one.stored:
                yield block
                continue
            try:
                yield dtypes.encode(_decode(block, one.found), one.stored)
            except ContentError as error:
                raise ContentError(f"{weight}: {error.message}", hint=error.hint) from error

    def damaged(self) -> list[str]:
        """The weights with values that are infinite or NaN."""
        return [
            weight
            for weight, one in self._weights.items()
            if any(dtypes.count_nonfinite(block, one.stored) for block in self.read(weight))
        ]

    def values(self, weight: str) -> npt.NDArray[np.float32]:
        """A weight in float32, computed from what is stored."""
        one = self._weights[weight]
        result = np.empty(math.prod(one.shape), dtype=np.float32)
        begin = 0
        for block in self.read(weight):
            result[begin : begin + block.size] = _decode(block, one.stored)
            begin += block.size
        return result.reshape(one.shape)

    def has_rows(self, weight: str) -> bool:
        """Whether some of its rows can be had without the others."""
        return not isinstance(self._weights[weight].source, Converted)

    def rows(self, weight: str, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Rows `begin` to `end` of a matrix that `has_rows`, as `values` has them."""
        one = self._weights[weight]
        assert not isinstance(one.source, Converted)
        width = one.shape[1]
        found = self._checkpoint.values(one.source, begin * width, end * width)
        if one.found != one.stored:
            found = dtypes.encode(_decode(found, one.found), one.stored)
        return _decode(found, one.stored).reshape(end - begin, width)

    def places(self) -> dict[str, tuple[str, ...]]:
        """Checkpoint tensor → the weights that, one after another, have its bits.

        Tensors that became no weight, or one with its values in another order, are left out.
        """
        found: dict[str, tuple[str, ...]] = {}
        made: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, one in self._weights.items():
            if isinstance(one.source, str):
                found[one.source] = (name,)
            else:
                made[tuple(tensor for _, tensor in one.source.sources)].append(name)
        for alias, name in self._aliases.items():
            for renamed in self._conversion.renamed:
                if renamed.target == alias:
                    found[renamed.name] = (name,)
        for tensors, names in made.items():
            if len(tensors) == 1 and self._follow(tensors[0], names):
                found[tensors[0]] = tuple(names)
        return found

    def _follow(self, tensor: str, names: Sequence[str]) -> bool:
        """Whether these weights, one after another, are that tensor."""
        blocks = [block for name in names for block in self._blocks(name)]
        whole = np.concatenate(blocks)
        size = math.prod(self._checkpoint.shape(tensor))
        return whole.size == size and np.array_equal(
            whole.view(np.uint8), self._checkpoint.values(tensor, 0, size).view(np.uint8)
        )

    def _sources(self, parameters: Mapping[str, Any]) -> dict[str, str | Converted]:
        sources: dict[str, str | Converted] = {}
        parts: defaultdict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
        converters = self._conversion.converters
        for name, target, pattern in self._conversion.renamed:
            if target not in parameters:
                continue
            if pattern is None:
                sources[target] = name
            else:
                parts[target, id(converters[pattern])].append((pattern, name))
        for (first, _), found in parts.items():
            made = Converted(found[0][0], tuple(found), first)
            for target in _convert(self._conversion, self._model, made, self._empty):
                if target in parameters:
                    sources[target] = made
        return sources

    def _ties(
        self, sources: dict[str, str | Converted], parameters: Mapping[str, tuple[int, ...]]
    ) -> dict[str, str]:
        """Parameter → the weight that it shares; as transformers ties them.

        Where a checkpoint has both, they are one only if they are equal.
        """
        aliases: dict[str, str] = {}
        for target, source in self._model.all_tied_weights_keys.items():
            if target in sources and source in sources:
                if self._equal(sources[target], sources[source]):
                    aliases[target] = source
            elif target in sources:
                aliases[source] = target
            elif source in sources:
                aliases[target] = source
        return {name: one for name, one in aliases.items() if name in parameters}

    def _equal(self, one: str | Converted, other: str | Converted) -> bool:
        checkpoint = self._checkpoint
        if isinstance(one, Converted) or isinstance(other, Converted):
            return False
        if (checkpoint.dtype(one), checkpoint.shape(one)) != (
            checkpoint.dtype(other),
            checkpoint.shape(other),
        ):
            return False
        size = math.prod(checkpoint.shape(one))
        return all(
            np.array_equal(
                checkpoint.values(one, begin, min(begin + LARGE, size)).view(np.uint8),
                checkpoint.values(other, begin, min(begin + LARGE, size)).view(np.uint8),
            )
            for begin in range(0, size, LARGE)
        )

    def _weight(
        self,
        name: str,
        source: str | Converted,
        shape: tuple[int, ...],
        dtype: DType | None,
    ) -> _Weight:
        tensors = [source] if isinstance(source, str) else [one for _, one in source.sources]
        found = {self._checkpoint.dtype(one) for one in tensors}
        if len(found) != 1 or not found <= dtypes.FLOATS:
            raise UnsupportedError(
                f"{name}: dtype: expected one of {', '.join(sorted(dtypes.FLOATS))}, found "
                f"{', '.join(sorted(found))}"
            )
        if isinstance(source, str):
            place, there = source, self._checkpoint.shape(source)
        else:
            made = _convert(self._conversion, self._model, source, self._empty)
            place, there = name, tuple(made[name].shape)
        if there != shape:
            raise CheckpointError(
                f"{self._checkpoint.folder}: {place}: shape: expected {shape}, found {there}"
            )
        kept = found.pop()
        return _Weight(source, kept, trunk_dtype(kept, shape, dtype), shape)

    def _blocks(self, weight: str) -> Iterator[npt.NDArray[Any]]:
        """A weight's values as the checkpoint has them, in flat arrays."""
        one = self._weights[weight]
        if isinstance(one.source, Converted):
            made = _convert(self._conversion, self._model, one.source, self._tensor)[weight]
            yield _numpy(made.contiguous()).reshape(-1)
            return
        size = math.prod(one.shape)
        for begin in range(0, size, LARGE):
            yield self._checkpoint.values(one.source, begin, min(begin + LARGE, size))

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        shape = self._checkpoint.shape(name)
        values = self._checkpoint.values(name, 0, math.prod(shape)).reshape(shape)
        found = torch.from_numpy(values)
        return found.view(torch.bfloat16) if self._checkpoint.dtype(name) == "bf16" else found

    def _empty(self, name: str) -> torch.Tensor:
        import torch

        return torch.empty(self._checkpoint.shape(name), device="meta")


def _convert(
    conversion: Conversion, model: Any, made: Converted, read: Any
) -> dict[str, torch.Tensor]:
    """What transformers' converter gives, by parameter; `read` gives it a tensor by name."""
    converter = deepcopy(conversion.converters[made.pattern])
    for pattern, tensor in made.sources:
        converter.add_tensor(made.first, tensor, pattern, lambda tensor=tensor: read(tensor))
    try:
        found = converter.convert(made.first, model=model, config=model.config)
    except Exception as error:
        raise UnsupportedError(
            f"{made.sources[0][1]}: transformers cannot convert this tensor: {error}"
        ) from error
    return {name: one[0] if isinstance(one, list) else one for name, one in found.items()}


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    import torch

    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    found: npt.NDArray[Any] = bits.numpy()
    return found


def _decode(values: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = dtypes.decode(values.view(np.uint8), dtype, values.shape)
    return found
