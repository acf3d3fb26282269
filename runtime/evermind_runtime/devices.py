"""Where expert weights are held for computing: host memory, or a CUDA device.

A slot is allocated once per place in the budget; its tensors' OrtValues are built with it,
so that a page-in is one read and a binding is one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import DeviceError
from evermind_manifests.manifest import DType, Kind

from . import onnx_runtime

if TYPE_CHECKING:
    import onnxruntime as ort

# How each dtype looks in numpy, and its ONNX element type. numpy has no bfloat16.
_NUMPY: dict[DType, Any] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "f64": np.float64,
    "i64": np.int64,
    "i32": np.int32,
    "u8": np.uint8,
    "bool": np.bool_,
}
_ONNX_BFLOAT16 = 16
_LARGE = 64 * 1024
_PAGE = 4096
_CACHE_LINE = 64


class Slot:
    """Room for one expert. `buffer` takes the shard's bytes; `values` are its bound tensors.

    Owned by the pager: `pins` and the buffer's content change only under its lock.
    """

    __slots__ = ("buffer", "bytes", "pins", "values")

    def __init__(self, buffer: npt.NDArray[np.uint8], values: tuple[ort.OrtValue, ...]) -> None:
        self.buffer = buffer
        self.bytes = buffer.nbytes
        self.values = values
        self.pins = 0


class Device(Protocol):
    """What the pager and the sessions need to know of a device."""

    name: str
    providers: list[Any]

    def new_slot(self, kind: Kind) -> Slot:
        """Allocate room for one expert of `kind`."""

    def upload(self, slot: Slot, kind: Kind) -> None:
        """Make `slot.values` hold what was just read into `slot.buffer`."""


class CpuDevice:
    """Slots are host memory that graphs read in place."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.providers: list[Any] = ["CPUExecutionProvider"]

    def new_slot(self, kind: Kind) -> Slot:
        """Host memory, page-aligned where the expert is large enough to be worth it."""
        buffer = _aligned(kind.bytes)
        return Slot(buffer, _host_values(buffer, kind))

    def upload(self, slot: Slot, kind: Kind) -> None:
        """Nothing to do: the values are views of the buffer."""


class CudaDevice:
    """Slots are device memory; page-ins go through one host buffer per kind."""

    def __init__(self, index: int = 0) -> None:
        available = onnx_runtime.require().get_available_providers()
        if "CUDAExecutionProvider" not in available:
            raise DeviceError(
                f"device 'cuda' was asked for, but this ONNX Runtime has only "
                f"{', '.join(available)}",
                hint="Install 'evermind-pack[cuda]' (and uninstall onnxruntime), or use "
                "device='cpu'.",
            )
        self.name = f"cuda:{index}"
        self._index = index
        options = {"device_id": str(index), "arena_extend_strategy": "kSameAsRequested"}
        self.providers: list[Any] = [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
        self._staging: dict[int, tuple[npt.NDArray[np.uint8], tuple[ort.OrtValue, ...]]] = {}

    def new_slot(self, kind: Kind) -> Slot:
        """Device memory, and the kind's staging buffer to read into."""
        OrtValue = onnx_runtime.require().OrtValue
        values = tuple(
            OrtValue.ortvalue_from_shape_and_type(
                list(spec.shape),
                _ONNX_BFLOAT16 if spec.dtype == "bf16" else _NUMPY[spec.dtype],
                "cuda",
                self._index,
            )
            for spec in kind.tensors
        )
        return Slot(self._staged(kind)[0], values)

    def upload(self, slot: Slot, kind: Kind) -> None:
        """Copy the staging buffer to the device; returns when it is there."""
        onnx_runtime.require().copy_tensors(list(self._staged(kind)[1]), list(slot.values))

    def _staged(self, kind: Kind) -> tuple[npt.NDArray[np.uint8], tuple[ort.OrtValue, ...]]:
        if id(kind) not in self._staging:
            buffer = _aligned(kind.bytes)
            self._staging[id(kind)] = (buffer, _host_values(buffer, kind))
        return self._staging[id(kind)]


def open_device(name: str) -> CpuDevice | CudaDevice:
    """The device called `cpu`, `cuda` or `cuda:N`; `DeviceError` if it cannot be had."""
    if name == "cpu":
        return CpuDevice()
    kind, _, index = name.partition(":")
    if kind == "cuda" and (index.isdigit() or not index):
        return CudaDevice(int(index or 0))
    raise DeviceError(f"device: expected 'cpu', 'cuda' or 'cuda:N', found {name!r}")


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    alignment = _PAGE if size >= _LARGE else _CACHE_LINE
    raw = np.empty(size + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size]


def _host_values(buffer: npt.NDArray[np.uint8], kind: Kind) -> tuple[ort.OrtValue, ...]:
    return tuple(
        host_value(
            buffer[spec.offset : spec.offset + spec.bytes]
            .view(_NUMPY[spec.dtype])
            .reshape(spec.shape),
            spec.dtype,
        )
        for spec in kind.tensors
    )


def host_value(array: npt.NDArray[Any], dtype: DType) -> ort.OrtValue:
    """An OrtValue over `array`'s own memory (C-contiguous; bf16 as uint16 patterns)."""
    OrtValue = onnx_runtime.require().OrtValue
    if dtype == "bf16":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array)


def numpy_dtype(dtype: DType) -> Any:
    """The numpy dtype a value of `dtype` is held in."""
    return _NUMPY[dtype]
