"""Where expert weights are held for computing: host memory, or a CUDA device.

A slot is allocated once per place in the budget, and the OrtValues of its tensors are built
once over it, so that a page-in is one read and a binding is one call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import DeviceError
from evermind_manifests.manifest import DType, Kind, TensorSpec

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


class Slot(Protocol):
    """Room for one expert of any kind of the package.

    Owned by the pager: `pins` and the content change only under its lock. All slots of a
    package are as large as its largest kind, so memory never has to move between kinds.
    """

    bytes: int
    pins: int
    #: Host memory that takes a shard's bytes.
    buffer: npt.NDArray[np.uint8]

    def upload(self) -> None:
        """Make what was just read into `buffer` what `bind` binds."""

    def bind(self, binding: ort.IOBinding, names: Iterable[str], kind: Kind) -> None:
        """Bind the tensors of an expert of `kind`, in order, to these graph inputs."""


class Device(Protocol):
    """What the pager and the sessions need to know of a device."""

    name: str
    providers: list[Any]

    def new_slot(self, size: int) -> Slot:
        """Allocate a slot of `size` bytes."""


class CpuDevice:
    """Slots are host memory that graphs read in place."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.providers: list[Any] = ["CPUExecutionProvider"]

    def new_slot(self, size: int) -> Slot:
        """Host memory, page-aligned where the expert is large enough to be worth it."""
        return _CpuSlot(size)


class _CpuSlot:
    __slots__ = ("_values", "buffer", "bytes", "pins")

    def __init__(self, size: int) -> None:
        self.buffer = _aligned(size)
        self.bytes = size
        self.pins = 0
        # By the kind's identity: hashing a kind's whole layout at every step would cost more
        # than the step's bindings.
        self._values: dict[int, tuple[ort.OrtValue, ...]] = {}

    def upload(self) -> None:
        """Nothing to do: the values are views of the buffer."""

    def bind(self, binding: ort.IOBinding, names: Iterable[str], kind: Kind) -> None:
        values = self._values.get(id(kind))
        if values is None:
            values = self._values[id(kind)] = tuple(self._view(spec) for spec in kind.tensors)
        for name, value in zip(names, values, strict=True):
            binding.bind_ortvalue_input(name, value)

    def _view(self, spec: TensorSpec) -> ort.OrtValue:
        part = self.buffer[spec.offset : spec.offset + spec.bytes]
        return host_value(part.view(_NUMPY[spec.dtype]).reshape(spec.shape), spec.dtype)


class CudaDevice:
    """Slots are device memory; page-ins go through one host buffer."""

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
        self._staging: npt.NDArray[np.uint8] | None = None

    def new_slot(self, size: int) -> Slot:
        """Device memory, and the staging buffer all slots share (the pager's lock guards it)."""
        if self._staging is None:
            self._staging = _aligned(size)
        return _CudaSlot(self._staging, self._index)


class _CudaSlot:
    __slots__ = ("_index", "_memory", "_staged", "buffer", "bytes", "pins")

    def __init__(self, staging: npt.NDArray[np.uint8], index: int) -> None:
        OrtValue = onnx_runtime.require().OrtValue
        self.buffer = staging
        self.bytes = staging.nbytes
        self.pins = 0
        self._index = index
        self._staged = host_value(staging, "u8")
        self._memory = OrtValue.ortvalue_from_shape_and_type(
            [staging.nbytes], np.uint8, "cuda", index
        )

    def upload(self) -> None:
        """Copy the staging buffer to the device; returns when it is there."""
        onnx_runtime.require().copy_tensors([self._staged], [self._memory])

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
    if kind == "cuda" and (index.isdigit() or not index):
        return CudaDevice(int(index or 0))
    raise DeviceError(f"device: expected 'cpu', 'cuda' or 'cuda:N', found {name!r}")


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    alignment = _PAGE if size >= _LARGE else _CACHE_LINE
    raw = np.empty(size + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size]


def host_value(array: npt.NDArray[Any], dtype: DType) -> ort.OrtValue:
    """An OrtValue over `array`'s own memory (C-contiguous; bf16 as uint16 patterns)."""
    OrtValue = onnx_runtime.require().OrtValue
    if dtype == "bf16":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array)


def numpy_dtype(dtype: DType) -> Any:
    """The numpy dtype a value of `dtype` is held in."""
    return _NUMPY[dtype]
