"""A peer's model file on disk: `MoE0`, `EVL0`, `LMBC` or `.evermind`, told apart by content.

Opening checks header, manifest and length. Weights are read when they are asked for, each
from its place, so a file larger than memory can be exported or paged from. One expert's
four tensors lie next to each other in all formats.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from evermind_manifests import dtypes
from evermind_manifests.errors import CheckpointError
from evermind_manifests.manifest import DType

from . import evermind, evl0, lmbc, moe0
from .checkpoint import Layout, check_length, read_header
from .crc import TRAILER_BYTES, check_crc
from .disk_file import DiskFile
from .evermind import Container, check_sums, read_container
from .fnv import OFFSET, fnv1a
from .params import Family, Shape, canonical_shapes
from .peer_manifest import PeerManifest

LAYOUTS: Final[dict[int, Layout]] = {
    layout.magic: layout for layout in (moe0.LAYOUT, evl0.LAYOUT, lmbc.LAYOUT)
}
MAGICS: Final = (*LAYOUTS, evermind.MAGIC)
_CHUNK = 1 << 20


def is_peer_file(head: bytes) -> bool:
    """Whether a file that begins with `head` (4 bytes or more) is one of the four."""
    return len(head) >= 4 and struct.unpack_from("<I", head)[0] in MAGICS


class PeerFile:
    """An open file, closed when it is no longer used. Safe to share between threads.

    `config` is resolved (`validate_config`); `dtype` is what the weights are stored as;
    `manifest` is that of an `.evermind` file, else `None`; `tensors` maps canonical names to
    float32 arrays, each read when it is asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `CheckpointError` for a file that cannot be right, `LocationError` for none."""
        disk = self._disk = DiskFile(path)
        self.location = disk.location
        self._container = self._open_container()
        self._layout, self._begin, self._end = self._find_checkpoint()
        head = disk.read(self._begin, min(self._layout.header_bytes, self._end - self._begin))
        self._header = read_header(self._layout, head, self.location)
        check_length(self._layout, self._header, self._end - self._begin, self.location)
        self.family: Family = self._layout.family
        self.manifest: PeerManifest | None = None
        self.config = self._header.config
        if self._container:
            self.manifest = self._container.manifest
            # The manifest's config has the seed and other keys a checkpoint has no room for.
            self.config = self.manifest.config
        self.dtype: Literal["f16", "f32"] = "f16" if self._header.half else "f32"
        self._tensors = _Tensors(
            disk,
            self._begin + self._layout.header_bytes,
            self.dtype,
            canonical_shapes(self.family, self.config),
        )
        self.tensors: Mapping[str, npt.NDArray[np.float32]] = self._tensors

    def read_codec(self) -> bytes:
        """The bytes after an `.evermind` file's checkpoint, as they are; possibly none."""
        return bytes(self._disk.read(self._end, self._disk.size - self._end))

    def offset(self, name: str) -> int:
        """Where the tensor `name` begins in the file."""
        return self._tensors.offsets[name]

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, in order, with the bytes from `offset` on.

        Raises `TruncatedError` where the file has become shorter.
        """
        self._disk.read_into(offset, buffers)

    def verify(self) -> None:
        """Read the file once and raise `CheckpointError` unless all its checksums are right.

        `MoE0` and `LMBC` have none. Takes a second per 80 MB of an `.evermind` file (FNV-1a).
        """
        parameters = self._begin + self._header.end
        with_trailer = self._end > parameters
        crc, checkpoint, codec = 0, OFFSET, OFFSET
        if with_trailer or self._container:
            for begin in range(self._begin, self._disk.size, _CHUNK):
                chunk = self._disk.read(begin, min(_CHUNK, self._disk.size - begin))
                crc = zlib.crc32(chunk[: max(0, parameters - begin)], crc)
                if self._container:
                    cut = max(0, self._end - begin)
                    checkpoint = fnv1a(chunk[:cut], checkpoint)
                    codec = fnv1a(chunk[cut:], codec)
        if self._container:
            check_sums(self._container, checkpoint, codec, self.location)
        if with_trailer:
            check_crc(self._disk.read(parameters, TRAILER_BYTES), crc, self.location)

    def check_open(self) -> None:
        """Raise `ClosedError` once the file is closed."""
        self._disk.check_open()

    def close(self) -> None:
        """Close the file; its tensors cannot be read afterwards."""
        self._disk.close()

    def _open_container(self) -> Container | None:
        if self._magic() != evermind.MAGIC:
            return None
        return read_container(self._disk.read, self._disk.size, self.location)

    def _find_checkpoint(self) -> tuple[Layout, int, int]:
        """The checkpoint's layout, its first byte, and the byte after its last."""
        if self._container:
            begin = self._container.checkpoint_offset
            return self._container.layout, begin, begin + self._container.checkpoint_bytes
        magic = self._magic()
        if magic not in LAYOUTS:
            raise CheckpointError(
                f"{self.location}: magic: expected that of MoE0, EVL0, LMBC or .evermind, "
                f"found 0x{magic:08X}"
            )
        return LAYOUTS[magic], 0, self._disk.size

    def _magic(self) -> int:
        if self._disk.size < 4:
            raise CheckpointError(
                f"{self.location}: magic: expected 4 bytes, found {self._disk.size}"
            )
        return int.from_bytes(self._disk.read(0, 4), "little")


class _Tensors(Mapping[str, npt.NDArray[np.float32]]):
    """Tensors that lie one after the other from `begin` on."""

    def __init__(self, disk: DiskFile, begin: int, dtype: DType, shapes: dict[str, Shape]) -> None:
        self._disk = disk
        self._dtype: DType = dtype
        self._shapes = shapes
        self.offsets: dict[str, int] = {}
        for name, shape in shapes.items():
            self.offsets[name] = begin
            begin += dtypes.tensor_bytes(dtype, shape)

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        shape = self._shapes[name]
        data = self._disk.read(self.offsets[name], dtypes.tensor_bytes(self._dtype, shape))
        array: npt.NDArray[np.float32] = dtypes.decode(data, self._dtype, shape)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
