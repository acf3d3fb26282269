"""A model's tensors that exist when they are asked for: models larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .blueprint import FloatArray


class LazyTensors(Mapping[str, FloatArray]):
    """`make(name, shape)` for every name in `shapes`, anew each time: nothing is kept."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        make: Callable[[str, tuple[int, ...]], FloatArray],
    ) -> None:
        self._shapes = shapes
        self._make = make

    def __getitem__(self, name: str) -> FloatArray:
        return self._make(name, self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
