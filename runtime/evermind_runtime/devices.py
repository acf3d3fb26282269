"""Where expert weights are held for computing: host memory, or a CUDA device.

A slot is allocated once per place in the budget, and the OrtValues of its tensors are built
once over it, so that a page-in is one read and a binding is one call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import DeviceError
from evermind_manifests.manifest import DType, Kind, TensorSpec

from . import onnx_runtime
from .host_memory import HostMemory

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


class Slot(Protocol):
    """Room for one expert of any kind of the package.

    Owned by the pager: `pins` and `valid` change only under its lock. All slots of a package
    are as large as its largest kind, so memory never has to move between kinds.
    """

    bytes: int
    #: How many steps and readers use it.
    pins: int
    #: Whether it holds an expert, verified and ready to be bound.
    valid: bool

    def filling(self) -> AbstractContextManager[memoryview]:
        """Host memory that takes a shard's bytes; leaving it without an error takes them over.

        At least `bytes` long, and page-aligned where `bytes` is `DIRECT_BYTES` or more. Only
        one thread fills a slot at a time, but several threads fill different slots.
        """

    def bind(self, binding: ort.IOBinding, names: Iterable[str], kind: Kind) -> None:
        """Bind the tensors of an expert of `kind`, in order, to these graph inputs."""


class Device(Protocol):
    """What the pager and the sessions need to know of a device."""

    name: str
    providers: list[Any]

    def slots(self, size: int, most: int) -> Callable[[], Slot]:
        """Makes slots of `size` bytes, `most` of them at most, each allocated when asked for."""


class CpuDevice:
    """Slots are host memory that graphs read in place."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.providers: list[Any] = ["CPUExecutionProvider"]

    def slots(self, size: int, most: int) -> Callable[[], Slot]:
        """Host memory, in pages of its own where it is read into directly."""
        memory = HostMemory(most * size)
        return lambda: CpuSlot(memory.take(size))


class CpuSlot:
    """A slot in host memory, whose `buffer` is what graphs read."""

    __slots__ = ("_filling", "_values", "buffer", "bytes", "pins", "valid")

    def __init__(self, buffer: npt.NDArray[np.uint8]) -> None:
        self.buffer = buffer
        self._filling = nullcontext(self.buffer.data)
        self.bytes = len(buffer)
        self.pins = 0
        self.valid = False
        # By the kind's identity: hashing a kind's whole layout at every step would cost more
        # than the step's bindings.
        self._values: dict[int, tuple[ort.OrtValue, ...]] = {}

    def filling(self) -> AbstractContextManager[memoryview]:
        """The buffer itself: the values are views of it."""
        return self._filling

    def bind(self, binding: ort.IOBinding, names: Iterable[str], kind: Kind) -> None:
        """See `Slot`; the values are views of the buffer, built once per kind."""
        values = self._values.get(id(kind))
        if values is None:
            values = self._values[id(kind)] = tuple(self._view(spec) for spec in kind.tensors)
        for name, value in zip(names, values, strict=True):
            binding.bind_ortvalue_input(name, value)

    def _view(self, spec: TensorSpec) -> ort.OrtValue:
        part = self.buffer[spec.offset : spec.offset + spec.bytes]
        return host_value(part.view(_NUMPY[spec.dtype]).reshape(spec.shape), spec.dtype)


class CudaDevice:
    """Slots are device memory; page-ins go through host buffers, one for every reader."""

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
        self._staging = _Staging()

    def slots(self, size: int, most: int) -> Callable[[], Slot]:
        """Device memory, filled through the staging buffers that all slots share."""
        return lambda: _CudaSlot(size, self._staging, self._index)


class _Staging:
    """Host buffers between a reader and the device: as many as are in use at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[npt.NDArray[np.uint8], ort.OrtValue]] = []

    @contextmanager
    def borrow(self, size: int) -> Iterator[tuple[npt.NDArray[np.uint8], ort.OrtValue]]:
        """A buffer and an OrtValue over it, nobody else's until the `with` ends."""
        with self._lock:
            staged = self._idle.pop() if self._idle else None
        if staged is None:
            buffer = HostMemory(size).take(size)
            staged = buffer, host_value(buffer, "u8")
        try:
            yield staged
        finally:
            with self._lock:
                self._idle.append(staged)


class _CudaSlot:
    __slots__ = ("_index", "_memory", "_staging", "bytes", "pins", "valid")

    def __init__(self, size: int, staging: _Staging, index: int) -> None:
        OrtValue = onnx_runtime.require().OrtValue
        self.bytes = size
        self.pins = 0
        self.valid = False
        self._index = index
        self._staging = staging
        self._memory = OrtValue.ortvalue_from_shape_and_type([size], np.uint8, "cuda", index)

    @contextmanager
    def filling(self) -> Iterator[memoryview]:
        """A staging buffer; what it holds is on the device when the `with` has ended."""
        with self._staging.borrow(self.bytes) as (buffer, value):
            yield buffer.data
            onnx_runtime.require().copy_tensors([value], [self._memory])

    def bind(self, binding: ort.IOBinding, names: Iterable[str], kind: Kind) -> None:
        base = self._memory.data_ptr()
        for name, spec in zip(names, kind.tensors, strict=True):
            dtype = _ONNX_BFLOAT16 if spec.dtype == "bf16" else _NUMPY[spec.dtype]
            binding.bind_input(
                name, "cuda", self._index, dtype, list(spec.shape), base + spec.offset
            )


def open_device(name: str) -> CpuDevice | CudaDevice:
    """The device called `cpu`, `cuda` or `cuda:N`; `DeviceError` if it cannot be had."""
    if name == "cpu":
        return CpuDevice()
    kind, _, index = name.partition(":")
    if kind == "cuda" and (not index or (index.isascii() and index.isdecimal())):
        return CudaDevice(int(index or 0))
    raise DeviceError(f"device: expected 'cpu', 'cuda' or 'cuda:N', found {name!r}")


def host_value(array: npt.NDArray[Any], dtype: DType) -> ort.OrtValue:
    """An OrtValue over `array`'s own memory (C-contiguous; bf16 as uint16 patterns)."""
    OrtValue = onnx_runtime.require().OrtValue
    if dtype == "bf16":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array)


def numpy_dtype(dtype: DType) -> Any:
    """The numpy dtype a value of `dtype` is held in."""
    return _NUMPY[dtype]
