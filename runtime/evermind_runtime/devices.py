"""Where expert weights are held for computing: host memory, or a CUDA device.

A slot is allocated once per place in the budget, and the OrtValues of its tensors are built
once over it, so that a page-in is one read and a binding is one call.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
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

_CUDA_PROVIDER = "CUDAExecutionProvider"
_PROBE_BYTES = 64


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


class Place(Protocol):
    """Where graphs read and write one buffer of a state."""

    #: Whether what graphs wrote there is not in the buffer's array yet.
    ahead: bool

    def bind(self, binding: ort.IOBinding, given: str, taken: str) -> None:
        """Bind it as the graph input `given` and the output `taken` both."""

    def pull(self) -> None:
        """Have in the array what graphs have written."""


class Device(Protocol):
    """What the pager, the sessions and the states need to know of a device."""

    name: str
    providers: list[Any]
    #: Whether a graph gets copies of its inputs in host memory, made when they are bound: what
    #: changes is bound again then.
    copies: bool

    def slots(self, size: int, most: int) -> Callable[[], Slot]:
        """Makes slots of `size` bytes, `most` of them at most, each allocated when asked for."""

    def place(self, array: npt.NDArray[Any], dtype: DType) -> Place:
        """Where graphs have a buffer that now holds what `array` (C-contiguous) does."""


class CpuDevice:
    """Slots are host memory that graphs read in place."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.providers: list[Any] = ["CPUExecutionProvider"]
        self.copies = False

    def slots(self, size: int, most: int) -> Callable[[], Slot]:
        """Host memory, in pages of its own where it is read into directly."""
        memory = HostMemory(most * size)
        return lambda: CpuSlot(memory.take(size))

    def place(self, array: npt.NDArray[Any], dtype: DType) -> Place:
        """The array itself."""
        return _HostPlace(host_value(array, dtype))


class _HostPlace:
    __slots__ = ("ahead", "value")

    def __init__(self, value: ort.OrtValue) -> None:
        self.ahead = False
        self.value = value

    def bind(self, binding: ort.IOBinding, given: str, taken: str) -> None:
        binding.bind_ortvalue_input(given, self.value)
        binding.bind_ortvalue_output(taken, self.value)

    def pull(self) -> None:
        self.ahead = False


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
        """See `Slot`."""
        for name, value in zip(names, self.values(kind), strict=True):
            binding.bind_ortvalue_input(name, value)

    def values(self, kind: Kind) -> tuple[ort.OrtValue, ...]:
        """The tensors of an expert of `kind`, views of the buffer that are built once."""
        values = self._values.get(id(kind))
        if values is None:
            values = self._values[id(kind)] = tuple(self._view(spec) for spec in kind.tensors)
        return values

    def _view(self, spec: TensorSpec) -> ort.OrtValue:
        part = self.buffer[spec.offset : spec.offset + spec.bytes]
        return host_value(part.view(_NUMPY[spec.dtype]).reshape(spec.shape), spec.dtype)


class CudaDevice:
    """Slots are device memory; page-ins go through host buffers, one for every reader."""

    def __init__(self, index: int = 0) -> None:
        """Raises `DeviceError` unless memory can be had on the device: that ONNX Runtime was built
        for CUDA says nothing of a GPU, its driver and its libraries.
        """
        ort = onnx_runtime.require()
        available = ort.get_available_providers()
        if _CUDA_PROVIDER not in available:
            raise DeviceError(
                f"device 'cuda' was asked for, but this ONNX Runtime has only "
                f"{', '.join(available)}",
                hint="Install 'evermind-pack[cuda]' (and uninstall onnxruntime), or use "
                "device='cpu'.",
            )
        self.name = f"cuda:{index}"
        self._index = index
        if hasattr(ort, "preload_dlls"):
            with _cuda_errors(index), redirect_stdout(sys.stderr):  # it prints what is missing
                ort.preload_dlls()
        _cuda_memory(_PROBE_BYTES, index)
        options = {
            "device_id": str(index),
            "arena_extend_strategy": "kSameAsRequested",
            # What is float32 (norms, routers, recurrences) keeps all its digits.
            "use_tf32": "0",
            # By default every new length of a prompt has all of cuDNN's algorithms timed.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        self.providers: list[Any] = [(_CUDA_PROVIDER, options), "CPUExecutionProvider"]
        self.copies = True
        self._staging = _Staging()

    def place(self, array: npt.NDArray[Any], dtype: DType) -> Place:
        """Device memory with a copy of the array."""
        return _CudaPlace(array, dtype, self._index)

    def slots(self, size: int, most: int) -> Callable[[], Slot]:
        """Device memory, filled through the staging buffers that all slots share."""
        return lambda: _CudaSlot(size, self._staging, self._index)


class _Staging:
    """Host buffers between a reader and the device: as many as are in use at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[npt.NDArray[np.uint8]] = []

    @contextmanager
    def borrow(self, size: int) -> Iterator[npt.NDArray[np.uint8]]:
        """A buffer, nobody else's until the `with` ends."""
        with self._lock:
            buffer = self._idle.pop() if self._idle else None
        if buffer is None:
            buffer = HostMemory(size).take(size)
        try:
            yield buffer
        finally:
            with self._lock:
                self._idle.append(buffer)


@contextmanager
def _cuda_errors(index: int) -> Iterator[None]:
    """`DeviceError` in the place of whatever ONNX Runtime raises where it uses the device."""
    try:
        yield
    except Exception as error:
        raise DeviceError(
            f"device 'cuda:{index}': {error}",
            hint="Is there such a GPU, with free memory? It needs NVIDIA's driver, and the CUDA "
            "and cuDNN libraries that ONNX Runtime was built for: "
            "pip install 'evermind-pack[cuda]' brings them (nvidia-smi shows the driver).",
        ) from error


def _cuda_memory(size: int, index: int) -> ort.OrtValue:
    with _cuda_errors(index):
        return onnx_runtime.require().OrtValue.ortvalue_from_shape_and_type(
            [size], np.uint8, "cuda", index
        )


class _CudaSlot:
    __slots__ = ("_index", "_memory", "_staging", "bytes", "pins", "valid")

    def __init__(self, size: int, staging: _Staging, index: int) -> None:
        self.bytes = size
        self.pins = 0
        self.valid = False
        self._index = index
        self._staging = staging
        self._memory = _cuda_memory(size, index)

    @contextmanager
    def filling(self) -> Iterator[memoryview]:
        """A staging buffer; what it holds is on the device when the `with` has ended."""
        with self._staging.borrow(self.bytes) as buffer:
            yield buffer.data
            with _cuda_errors(self._index):
                self._memory.update_inplace(buffer)

    def bind(self, binding: ort.IOBinding, names: Iterable[str], kind: Kind) -> None:
        base = self._memory.data_ptr()
        for name, spec in zip(names, kind.tensors, strict=True):
            binding.bind_input(
                name,
                "cuda",
                self._index,
                _element(spec.dtype),
                list(spec.shape),
                base + spec.offset,
            )


class _CudaPlace:
    """Device memory for a buffer, as large as its array, which is what the host knows of it."""

    __slots__ = ("_array", "_dtype", "_index", "_memory", "ahead")

    def __init__(self, array: npt.NDArray[Any], dtype: DType, index: int) -> None:
        self.ahead = False
        self._array = array
        self._dtype: DType = dtype
        self._index = index
        self._memory = _cuda_memory(array.nbytes, index)
        with _cuda_errors(index):
            self._memory.update_inplace(array.reshape(-1).view(np.uint8))

    def bind(self, binding: ort.IOBinding, given: str, taken: str) -> None:
        where = "cuda", self._index, _element(self._dtype)
        shape, address = list(self._array.shape), self._memory.data_ptr()
        binding.bind_input(given, *where, shape, address)
        binding.bind_output(taken, *where, shape, address)

    def pull(self) -> None:
        if self.ahead:
            with _cuda_errors(self._index):
                self._array.reshape(-1).view(np.uint8)[...] = self._memory.numpy()
            self.ahead = False


def _element(dtype: DType) -> Any:
    """What ONNX Runtime's bindings call `dtype`."""
    return _ONNX_BFLOAT16 if dtype == "bf16" else _NUMPY[dtype]


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
