"""`TKP1`: the checkpoint a Tokitai training run leaves; weights are read, moments skipped.

    u32 magic "TKP1"   u32 version 1   u32 step   u32 parameters   u32 length, UTF-8 configuration
    per parameter: u32 length, name; u32 count, f32 weights; u32 count, f32 first moment;
                   u32 count, f32 second moment; u32 own step; u8 has-gradient; if 1: u32 count, f32

Little-endian; shapes are not stored. Source: specs/tokitai.md, section 5. Strict: every length
is compared with the file's before it is used, and nothing may follow the last parameter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import CheckpointError

from .disk_file import DiskFile

MAGIC: Final = b"TKP1"
VERSION: Final = 1
# A parameter without name, weights and gradient: four counts, a step and a byte.
_LEAST_BYTES: Final = 21
_MAX_PARAMETERS: Final = 1_000_000
_MAX_NAME_BYTES: Final = 4096
_MAX_TEXT_BYTES: Final = 16 * 1024 * 1024


class _Place(NamedTuple):
    offset: int
    elements: int


class Tkp1File(Mapping[str, npt.NDArray[np.float32]]):
    """A checkpoint's weights by name, flat float32 arrays, each read when it is asked for.

    `step` and `configuration` are the header's; `counts` the elements of each parameter.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Walks over the file once, without its weights.

        Raises `CheckpointError` for a file that cannot be right, `LocationError` for none.
        """
        self._disk = DiskFile(path)
        self.location = self._disk.location
        cursor = _Cursor(self._disk)
        magic = cursor.take(len(MAGIC), "magic")
        if magic != MAGIC:
            raise CheckpointError(f"{self.location}: magic: expected {MAGIC!r}, found {magic!r}")
        version = cursor.u32("version")
        if version != VERSION:
            raise CheckpointError(
                f"{self.location}: version: expected {VERSION}, found {version}",
                hint="An older layout of these files, with 64-bit lengths, is not supported.",
            )
        self.step = cursor.u32("step")
        parameters = cursor.u32("parameter count")
        self.configuration = cursor.text("configuration", _MAX_TEXT_BYTES)
        most = min(cursor.left // _LEAST_BYTES, _MAX_PARAMETERS)
        if parameters > most:
            cursor.refuse("parameter count", f"at most {most:,}", f"{parameters:,}")
        self._places: dict[str, _Place] = {}
        for number in range(parameters):
            self._read_parameter(cursor, f"parameter {number}")
        if cursor.left:
            cursor.refuse("end of the last parameter", "nothing after it", f"{cursor.left:,} bytes")

    @property
    def counts(self) -> dict[str, int]:
        """Elements of every parameter."""
        return {name: place.elements for name, place in self._places.items()}

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        place = self._places[name]
        return np.frombuffer(self._disk.read(place.offset, 4 * place.elements), "<f4")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the file; its weights cannot be read afterwards."""
        self._disk.close()

    def _read_parameter(self, cursor: _Cursor, field: str) -> None:
        name = cursor.text(f"{field}: name", _MAX_NAME_BYTES)
        if name in self._places:
            cursor.refuse(f"{field}: name", "one that no other has", repr(name))
        field = f"{field} {name!r}"
        place = cursor.floats(f"{field}: weights")
        others = [cursor.floats(f"{field}: {moment} moment") for moment in ("first", "second")]
        cursor.u32(f"{field}: step")
        flag = cursor.take(1, f"{field}: has-gradient")[0]
        if flag > 1:
            cursor.refuse(f"{field}: has-gradient", "0 or 1", str(flag))
        if flag:
            others.append(cursor.floats(f"{field}: gradient"))
        for other in others:
            # An optimiser that has not stepped yet may have no moments.
            if other.elements not in (0, place.elements):
                cursor.refuse(
                    f"{field}: moments or gradient",
                    f"{place.elements:,} elements",
                    f"{other.elements:,}",
                )
        self._places[name] = place


class _Cursor:
    """A position in the file; whatever does not fit in what is left is refused."""

    def __init__(self, disk: DiskFile) -> None:
        self._disk = disk
        self._position = 0

    @property
    def left(self) -> int:
        return self._disk.size - self._position

    def take(self, length: int, field: str) -> bytes:
        if length > self.left:
            self.refuse(field, f"{length:,} bytes", f"{self.left:,} before the end of the file")
        data = bytes(self._disk.read(self._position, length))
        self._position += length
        return data

    def u32(self, field: str) -> int:
        return int.from_bytes(self.take(4, field), "little")

    def text(self, field: str, limit: int) -> str:
        length = self.u32(field)
        if length > limit:
            self.refuse(field, f"at most {limit:,} bytes", f"{length:,}")
        try:
            return self.take(length, field).decode()
        except UnicodeDecodeError as error:
            self.refuse(field, "UTF-8", str(error))

    def floats(self, field: str) -> _Place:
        """Step over a count and its floats."""
        count = self.u32(field)
        if 4 * count > self.left:
            self.refuse(field, f"at most {self.left // 4:,} elements", f"{count:,}")
        place = _Place(self._position, count)
        self._position += 4 * count
        return place

    def refuse(self, field: str, expected: str, found: str) -> NoReturn:
        raise CheckpointError(f"{self._disk.location}: {field}: expected {expected}, found {found}")
