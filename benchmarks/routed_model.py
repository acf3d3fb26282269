"""A model whose routing is given: token t of its vocabulary goes to chosen experts.

Real routing with random weights, for measuring what routing decides. Embeddings are
orthogonal, so a router that sums the embeddings of an expert's tokens scores exactly those;
experts add almost nothing to the hidden state, and the convolution nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from evermind_exporters import ModelSource
from evermind_exporters.checkpoints import canonical_shapes, validate_config

from .common import random_values
from .models import FAMILY

Routes = np.ndarray
"""(tokens, layers, top_k) int: the experts of every token in every layer."""


def routed_model(routes: Routes, *, experts: int, width: int, hidden: int) -> ModelSource:
    """Token t of the vocabulary is routed to `routes[t]`; needs tokens <= width."""
    tokens, layers, top_k = routes.shape
    assert tokens <= width, "embeddings could not be orthogonal"
    config = validate_config(
        FAMILY,
        {
            "vocabSize": tokens,
            "dModel": width,
            "numLayers": layers,
            "convKernel": 1,
            "hiddenDim": hidden,
            "numExperts": experts,
            "topK": top_k,
        },
    )
    return ModelSource(FAMILY, config, _RoutedTensors(config, routes), "routed")


class _RoutedTensors(Mapping[str, np.ndarray]):
    """Tensors made when asked for; those of experts are views of one run of random values."""

    def __init__(self, config: dict[str, Any], routes: Routes) -> None:
        self._shapes = canonical_shapes(FAMILY, config)
        width = config["dModel"]
        basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(width, width)))
        self._embedding = (basis[: len(routes)] * np.sqrt(width)).astype(np.float32)
        self._routes = routes
        self._largest = max(int(np.prod(shape)) for shape in self._shapes.values())
        self._drawn = random_values((self._largest + 64 * len(self._shapes),), 2, 1.0)
        self._at = {name: 64 * number for number, name in enumerate(self._shapes)}

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        if name == "token_embedding.weight":
            return self._embedding
        if "norm" in name:
            return np.ones(shape, np.float32)
        if "conv" in name:
            return np.zeros(shape, np.float32)
        if "router" in name:
            return self._router(int(name.split(".")[1]), shape)
        scale = np.float32(0.001 if "w2" in name or "b" in name else shape[-1] ** -0.5)
        begin = self._at[name]
        return self._drawn[begin : begin + int(np.prod(shape))].reshape(shape) * scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _router(self, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        chosen = np.zeros((len(self._routes), shape[0]), np.float32)
        np.put_along_axis(chosen, self._routes[:, layer], 1.0, axis=1)
        return chosen.T @ self._embedding / np.float32(np.sqrt(shape[1]))
