"""A model whose experts are large enough for reader threads: 12 of 516 KiB."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import evermind_runtime as em

LAYERS, EXPERTS, TOP_K = 2, 6, 2
CONFIG = {
    "vocabSize": 40,
    "dModel": 256,
    "numLayers": LAYERS,
    "hiddenDim": 512,
    "numExperts": EXPERTS,
    "topK": TOP_K,
}
TOKENS = {"tokens": list(range(40))}
load = partial(em.load, plan="paged")
Read = Callable[[str, int, memoryview], None]


def watch(model: em.Model, around: Callable[[Read, str, int, memoryview], None]) -> None:
    """Have `around` do the store's reads."""
    store = model._package.store
    honest = store.read_into
    store.read_into = lambda *read: around(honest, *read)  # type: ignore[method-assign]
