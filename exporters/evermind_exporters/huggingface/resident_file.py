"""The resident file of an imported model: the trunk's weights and the exporter's tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import DType
from evermind_manifests.shard import Buffer

from ..resident import Stored, TensorFile
from .cut import Cut
from .trunk import Trunk

_TABLES: dict[str, DType] = {"float32": "f32", "float64": "f64", "int64": "i64", "int32": "i32"}


def resident_file(cut: Cut) -> TensorFile:
    """Where each weight and table will lie. Raises `UnsupportedError` for a table of no use."""
    return TensorFile({**cut.weights, **{name: _table(name, cut) for name in cut.tables}})


def resident_reader(trunk: Trunk, cut: Cut) -> Callable[[str], Iterator[Buffer]]:
    """What gives a tensor's bytes by name, a block at a time."""

    def read(name: str) -> Iterator[Buffer]:
        if name in cut.weights:
            yield from (block.view(np.uint8).data for block in trunk.read(name))
        else:
            yield np.ascontiguousarray(cut.constants[name]).tobytes()

    return read


def _table(name: str, cut: Cut) -> Stored:
    array = cut.constants[name]
    if array.dtype.name not in _TABLES:
        raise UnsupportedError(f"{name}: a table of {array.dtype} in the exported graph")
    return Stored(_TABLES[array.dtype.name], array.shape)
