"""transformers' eager model as a reference, in the dtype it was made in.

A layer's weights are read when it runs, an expert's when it is indexed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from evermind_manifests import dtypes
from evermind_manifests.errors import ContentError, UnsupportedError
from evermind_manifests.manifest import DType

from .checkpoint import Checkpoint, Rows
from .expert_map import ExpertRows
from .experts import ExpertsModule, Parameter
from .opaque import experts_run_by
from .skeleton import borrowed
from .trunk import Trunk

if TYPE_CHECKING:
    import torch


class Reference:
    """transformers' eager model over the trunk, experts as the package stores them.

    `stored_as` has for each layer what its shards' tensors are stored as.
    """

    def __init__(
        self,
        model: Any,
        modules: list[ExpertsModule],
        layers: list[list[ExpertRows]],
        checkpoint: Checkpoint,
        stored_as: list[dict[str, DType]],
        trunk: Trunk,
    ) -> None:
        self._model = model
        self._modules = modules
        self._trunk = trunk
        dtype = model.get_input_embeddings().weight.dtype
        for module, experts, types in zip(modules, layers, stored_as, strict=True):
            one = model.get_submodule(module.path)
            for part in module.parameters:
                one._parameters.pop(part.name, None)
                setattr(one, part.name, _Stack(part, experts, checkpoint, types, dtype))

    def logits(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """`(T, vocabulary)` for `tokens` `(T,)`."""
        import torch

        model, modules = self._model, self._modules
        with (
            experts_run_by(model, modules, "eager"),
            borrowed(model, self._trunk),
            torch.no_grad(),
        ):
            result = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
        found: npt.NDArray[np.float32] = result.logits[0].float().numpy()
        return found


class _Stack:
    """Stands in for a parameter `(experts, …)`: one expert is read when it is indexed.

    What multiplies by the whole stack multiplies by one expert after the other.
    """

    def __init__(
        self,
        part: Parameter,
        experts: list[ExpertRows],
        checkpoint: Checkpoint,
        stored_as: Mapping[str, DType],
        dtype: torch.dtype,
    ) -> None:
        self._dtype = dtype
        self._part = part
        self._experts = experts
        self._checkpoint = checkpoint
        self._stored_as = stored_as

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's, seen as a stack."""
        return (len(self._experts), *self[0].shape)

    def view(self, *shape: Any) -> _Stack:
        """Itself, as the stack it is."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        import torch

        if func is not torch.bmm or kwargs or not isinstance(args[1], cls):
            raise UnsupportedError(f"experts compute {func} with all their matrices at once")
        x, stack = args
        width = stack.shape[-1]
        # Rows of zeros belong to tokens that are another expert's, which need not be read for them.
        return torch.stack(
            [
                rows @ stack[expert] if rows.any() else rows.new_zeros(len(rows), width)
                for expert, rows in enumerate(x)
            ]
        )

    def __getitem__(self, expert: Any) -> torch.Tensor:
        import torch

        rows = self._experts[int(expert)]
        parts = []
        for tensor in self._part.tensors:
            dtype = self._stored_as[tensor]
            parts.append(as_float(stored(self._checkpoint, rows[tensor], dtype), dtype))
        whole = torch.from_numpy(np.concatenate(parts)).to(self._dtype)
        return whole.T if self._part.transposed else whole


def stored(checkpoint: Checkpoint, rows: Rows, dtype: DType) -> npt.NDArray[Any]:
    """The rows in `dtype`: untouched if the checkpoint has them in it, else rounded to it.

    Raises `ContentError` where a finite value would become infinite.
    """
    array, found = checkpoint.read(rows), checkpoint.dtype(rows.name)
    if found == dtype:
        return array
    try:
        return dtypes.encode(as_float(array, found), dtype)
    except ContentError as error:
        place = rows.name if rows.expert is None else f"{rows.name}, expert {rows.expert}"
        raise ContentError(f"{place}: {error.message}", hint=error.hint) from error


def as_float(array: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.float32]:
    """Stored values as float32."""
    result: npt.NDArray[np.float32] = dtypes.decode(
        np.ascontiguousarray(array).reshape(-1).view(np.uint8), dtype, array.shape
    )
    return result
