"""Stand-ins for an expert's matrices, while its arithmetic is looked at or traced.

transformers' code multiplies by them as by tensors; they have no values, and hear of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from evermind_manifests.errors import UnsupportedError

if TYPE_CHECKING:
    import torch


class Product(NamedTuple):
    """`x W^T`, or, `transposed`, `x W`, for a parameter's matrix W; the result has `width`."""

    parameter: str
    transposed: bool
    width: int


#: Computes a product, or stands in for it.
Multiply: TypeAlias = "Callable[[torch.Tensor, Product], torch.Tensor]"


class Matrix:
    """A matrix of one expert: tensors can be multiplied by it or its transpose."""

    def __init__(
        self, name: str, shape: tuple[int, int], multiply: Multiply, turned: bool = False
    ) -> None:
        self.name = name
        self.shape = shape
        self._multiply = multiply
        self._turned = turned

    @property
    def T(self) -> Matrix:  # noqa: N802 - as tensors call it
        """Its transpose."""
        return Matrix(self.name, (self.shape[1], self.shape[0]), self._multiply, not self._turned)

    def t(self) -> Matrix:
        """Its transpose."""
        return self.T

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        import torch

        name = getattr(func, "__name__", str(func))
        if len(args) == 2 and not kwargs and isinstance(args[1], cls):
            x, matrix = args
            if func is torch.nn.functional.linear:
                matrix = matrix.T
            elif name not in ("matmul", "__matmul__", "mm"):
                raise UnsupportedError(f"{matrix.name}: experts compute {name} with it")
            product = Product(matrix.name, not matrix._turned, matrix.shape[1])
            return matrix._multiply(x, product)
        raise UnsupportedError(f"experts compute {name} with a matrix of theirs")


def uses(module: Any, matrices: Mapping[str, tuple[int, int]], width: int) -> dict[str, bool]:
    """For each of an expert's matrices whether `module` multiplies by it, not by its transpose.

    Raises `UnsupportedError` where it is not used so just once, or `module` takes something else.
    """
    import torch

    seen: dict[str, list[bool]] = {name: [] for name in matrices}

    def multiply(x: torch.Tensor, product: Product) -> torch.Tensor:
        seen[product.parameter].append(product.transposed)
        return x.new_zeros(x.shape[0], product.width)

    try:
        with torch.no_grad():
            run_with(module, torch.zeros(1, width), matrices, multiply)
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{type(module).__name__}: experts that cannot be computed one by one: {error}"
        ) from error
    odd = [name for name, found in seen.items() if len(found) != 1]
    if odd:
        raise UnsupportedError(f"experts: expected one product with {', '.join(odd)}")
    return {name: found[0] for name, found in seen.items()}


def run_with(
    module: Any, x: torch.Tensor, matrices: Mapping[str, tuple[int, int]], multiply: Multiply
) -> torch.Tensor:
    """What `module` makes of `x` with stand-ins, which it takes in the order it holds them in."""
    stand_ins = [Matrix(name, shape, multiply) for name, shape in matrices.items()]
    result: torch.Tensor = module(x, *stand_ins)
    return result
