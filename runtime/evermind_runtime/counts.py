"""Which experts tokens went to, and with what weight: counted always, for it costs little."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import GraphError
from evermind_manifests.manifest import Layer

from .state import Array


class ExpertCounts:
    """Tokens and gate mass by layer and expert. Safe to use from several threads."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._lock = threading.Lock()
        sizes = {layer.layer: layer.experts for layer in layers}
        self._tokens = {layer: [0] * size for layer, size in sizes.items()}
        self._gates = {layer: [0.0] * size for layer, size in sizes.items()}

    def routed(self, layer: int, ids: Array, gates: Array) -> list[int]:
        """Many tokens: `ids` `(T, k)`, -1 for none, and their `gates`.

        Returns how many of them went to each expert. Raises `GraphError` for an id that is none.
        """
        valid = ids >= 0
        size = len(self._tokens[layer])
        if (most := int(ids.max(initial=-1))) >= size:
            raise GraphError(
                f"layer {layer}: expected the router to choose experts from 0 to {size - 1}, "
                f"found {most}"
            )
        tokens: list[int] = np.bincount(ids[valid], minlength=size).tolist()
        mass: list[float] = np.bincount(ids[valid], gates[valid], minlength=size).tolist()
        with self._lock:
            for expert, count in enumerate(tokens):
                if count:
                    self._tokens[layer][expert] += count
                    self._gates[layer][expert] += mass[expert]
        return tokens

    def routed_one(self, layer: int, ids: Sequence[int], gates: Sequence[float] | None) -> None:
        """One token; without `gates` only it is counted."""
        tokens, mass = self._tokens[layer], self._gates[layer]
        if not 0 <= min(ids) <= max(ids) < len(tokens):
            return  # the pager refuses the step
        with self._lock:
            for position, expert in enumerate(ids):
                tokens[expert] += 1
                if gates is not None:
                    mass[expert] += gates[position]

    def of(self, layer: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """(tokens, gate mass) of each of a layer's experts."""
        with self._lock:
            return np.array(self._tokens[layer]), np.array(self._gates[layer])
