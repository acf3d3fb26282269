"""Safetensors files of a package, above all graphs/resident.safetensors: what is always in memory.

The header comes first and needs nothing but dtypes and shapes, so the graphs that point into the
file by offset are made before it, and its tensors are read as they are written. The bytes are
those that the `safetensors` library gives for the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from evermind_manifests.dtypes import tensor_bytes
from evermind_manifests.errors import ExportError
from evermind_manifests.manifest import RESIDENT_NAME, DType
from evermind_manifests.safetensors_header import PREFIX_BYTES
from evermind_manifests.shard import Buffer, align

from .onnx_graph import ExternalTensor

_LOCATION = RESIDENT_NAME.rpartition("/")[2]

# The library's order: the tensors of a wider dtype first, then by name.
_ORDER: tuple[DType, ...] = ("i64", "f64", "f32", "i32", "bf16", "f16", "u8", "bool")
_STORED: dict[Any, DType] = {
    np.dtype("<i8"): "i64",
    np.dtype("<f8"): "f64",
    np.dtype("<f4"): "f32",
    np.dtype("<i4"): "i32",
    np.dtype("<f2"): "f16",
    np.dtype("u1"): "u8",
    np.dtype("?"): "bool",
}


class Stored(NamedTuple):
    """What a tensor is stored as."""

    dtype: DType
    shape: tuple[int, ...]


class TensorFile:
    """A file of tensors that are known by dtype and shape: its header, and where each will lie."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self._tensors = dict(
            sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0]))
        )
        entries, spans, position = {}, {}, 0
        for name, (dtype, shape) in self._tensors.items():
            spans[name] = position, position + tensor_bytes(dtype, shape)
            entries[name] = {
                "dtype": dtype.upper(),
                "shape": shape,
                "data_offsets": spans[name],
            }
            position = spans[name][1]
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(align(len(text), 8))
        self._header = len(text).to_bytes(PREFIX_BYTES, "little") + text
        start = len(self._header)
        self.size = start + position
        #: Where each lies; offsets count from the file's first byte, as ONNX wants them.
        self.index: dict[str, ExternalTensor] = {
            name: ExternalTensor(
                _LOCATION, dtype, shape, start + spans[name][0], spans[name][1] - spans[name][0]
            )
            for name, (dtype, shape) in self._tensors.items()
        }

    def parts(self, read: Callable[[str], Iterator[Buffer]]) -> Iterator[Buffer]:
        """The file's bytes, part by part; `read` gives a tensor's, in as many as it likes.

        Raises `ExportError` if it gives more or fewer than the header says.
        """
        yield self._header
        for name, place in self.index.items():
            length = 0
            for part in read(name):
                length += memoryview(part).nbytes
                yield part
            if length != place.bytes:
                raise ExportError(f"{name}: expected {place.bytes:,} bytes, found {length:,}")


def pack_resident(
    tensors: Mapping[str, npt.NDArray[Any]],
) -> tuple[bytes, dict[str, ExternalTensor]]:
    """The bytes of a file with these tensors, and where each lies in them."""
    file = TensorFile({name: Stored(_dtype(name, one), one.shape) for name, one in tensors.items()})
    data = b"".join(file.parts(lambda name: iter([_bytes(tensors[name])])))
    return data, file.index


def _bytes(array: npt.NDArray[Any]) -> Buffer:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _dtype(name: str, array: npt.NDArray[Any]) -> DType:
    if array.dtype not in _STORED:
        raise ExportError(f"{name}: arrays of {array.dtype} are not stored")
    return _STORED[array.dtype]
