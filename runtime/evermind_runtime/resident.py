"""The resident part: resident.safetensors, read once into memory that graphs use in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import DigestError
from evermind_manifests.package import Package, check_digest
from evermind_manifests.safetensors_header import read_header

from .devices import host_value, numpy_dtype
from .host_memory import HostMemory

if TYPE_CHECKING:
    import onnxruntime as ort


class Resident:
    """Owns the file's bytes for the life of the model; `values` are views of them."""

    def __init__(self, package: Package) -> None:
        """Read and verify. Raises `DigestError` if the file is not what the manifest says."""
        self.path = package.manifest.resident
        self.buffer: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        if self.path is None:
            return
        entry = package.manifest.files[self.path]
        self.buffer = HostMemory(entry.bytes).take(entry.bytes)
        package.store.read_into(self.path, 0, self.buffer.data)
        field = f"files[{self.path!r}]"
        check_digest(
            self.buffer.data, entry.sha256, self.path, field, DigestError, package.location
        )
        self._header = read_header(self.buffer.data, where=self.path)

    @property
    def location(self) -> str:
        """What graphs call the file: its name, as external data lies beside the graph."""
        return (self.path or "").rpartition("/")[2]

    def value(self, name: str) -> ort.OrtValue:
        """The tensor `name` as an OrtValue over the buffer."""
        spec = self._header[name]
        array: npt.NDArray[Any] = self.buffer[spec.begin : spec.end].view(numpy_dtype(spec.dtype))
        return host_value(array.reshape(spec.shape), spec.dtype)
