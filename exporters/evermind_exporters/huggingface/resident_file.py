"""The resident file of an imported model: the trunk's weights and the exporter's tables.

All graphs share it, whatever they compute in: a weight stands in it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import DType
from evermind_manifests.shard import Buffer

from ..onnx_graph import ExternalTensor
from ..resident import Stored, TensorFile
from .cut import Cut
from .trunk import Trunk

_TABLES: dict[str, DType] = {"float32": "f32", "float64": "f64", "int64": "i64", "int32": "i32"}


class ResidentFile:
    """Where each weight and table lies that one of `cuts` takes.

    Raises `UnsupportedError` for a table of no use.
    """

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self.weights: dict[str, Stored] = {}
        self._tables: dict[str, npt.NDArray[Any]] = {}
        # By cut, what its tables are called in the file: each trace counts for itself.
        self._names: list[dict[str, str]] = []
        for number, cut in enumerate(cuts):
            self.weights |= cut.weights
            names = {}
            for name, array in cut.tables.items():
                same = name in self._tables and np.array_equal(self._tables[name], array)
                names[name] = name if same or not number else f"{name}.{number}"
                self._tables[names[name]] = array
            self._names.append(names)
        tables = {name: _table(name, array) for name, array in self._tables.items()}
        self._file = TensorFile({**self.weights, **tables})

    def index(self, cut: int) -> Mapping[str, ExternalTensor]:
        """Where the cut of this number finds what it takes."""
        found = self._file.index
        return found | {name: found[stored] for name, stored in self._names[cut].items()}

    def parts(self, trunk: Trunk) -> Iterator[Buffer]:
        """The file's bytes, part by part."""
        return self._file.parts(lambda name: self._read(trunk, name))

    def _read(self, trunk: Trunk, name: str) -> Iterator[Buffer]:
        if name in self.weights:
            yield from (block.view(np.uint8).data for block in trunk.read(name))
        else:
            yield np.ascontiguousarray(self._tables[name]).tobytes()


def _table(name: str, array: npt.NDArray[Any]) -> Stored:
    if array.dtype.name not in _TABLES:
        raise UnsupportedError(f"{name}: a table of {array.dtype} in the exported graph")
    return Stored(_TABLES[array.dtype.name], array.shape)
