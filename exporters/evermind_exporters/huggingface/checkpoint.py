"""A Hugging Face checkpoint folder: `config.json` and safetensors files, read tensor by tensor.

Layout: one `model.safetensors`, or files listed in `model.safetensors.index.json`
(`{"weight_map": {tensor: file}}`), as `save_pretrained` writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from evermind_manifests.dtypes import ITEMSIZE, STORAGE
from evermind_manifests.errors import CheckpointError, IntegrityError
from evermind_manifests.json_file import read_object
from evermind_manifests.manifest import DType
from evermind_manifests.safetensors_header import (
    PREFIX_BYTES,
    TensorRange,
    header_bytes,
    read_header,
)

from ..checkpoints.disk_file import DiskFile
from .misfits import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    damaged,
    without_config,
    without_weights,
)

_MAX_JSON_BYTES = 256 * 1024 * 1024


class Rows(NamedTuple):
    """Rows `begin` to `end` of a tensor, or, with `expert`, of the matrix or vector it holds there.

    `transposed`: of that matrix' transpose. `height`: the tensor's matrices lie one below the
    other, each of so many rows.
    """

    name: str
    expert: int | None
    begin: int
    end: int
    transposed: bool = False
    height: int | None = None

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the matrix or vector, in a tensor of `shape`."""
        if self.expert is None:
            return shape
        return shape[1:] if self.height is None else (self.height, *shape[1:])


class Header(NamedTuple):
    """What a safetensors file says: its tensors in the order of the file, and its metadata."""

    tensors: dict[str, TensorRange]
    metadata: dict[str, str]


class Checkpoint:
    """The tensors of a folder. Nothing is held in memory but their places."""

    def __init__(self, folder: Path) -> None:
        """Raises `CheckpointError` for a folder that is none, or is damaged."""
        self.folder = folder
        if not (folder / CONFIG_NAME).is_file():
            raise CheckpointError(
                f"{folder}: expected a checkpoint folder with a {CONFIG_NAME}, found none",
                hint=without_config(folder),
            )
        self._files: dict[str, DiskFile] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self._tensors: dict[str, tuple[str, TensorRange]] = {}
        listed = self._index()
        for file in sorted(set(listed.values())) if listed is not None else [WEIGHTS_NAME]:
            self._open(file)
        if listed is not None:
            self._check_index(listed)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration. Raises `CheckpointError` for what is no JSON object."""
        return read_json(self.folder / CONFIG_NAME)

    @property
    def names(self) -> list[str]:
        """Every tensor."""
        return list(self._tensors)

    def dtype(self, name: str) -> DType:
        """What a tensor is stored as."""
        return self._tensors[name][1].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._tensors[name][1].shape

    def read(self, rows: Rows) -> npt.NDArray[Any]:
        """The rows `(end - begin, …)` as they are stored (bfloat16 as its 16-bit pattern)."""
        file, spec = self._tensors[rows.name]
        dims = rows.matrix(spec.shape)
        start = (rows.expert or 0) * math.prod(dims)
        shape = dims if rows.transposed else (rows.end - rows.begin, *dims[1:])
        if not rows.transposed:
            start += rows.begin * math.prod(dims[1:])
        itemsize = ITEMSIZE[spec.dtype]
        data = self._files[file].read(spec.begin + start * itemsize, math.prod(shape) * itemsize)
        array = np.frombuffer(data, STORAGE[spec.dtype]).reshape(shape)
        return np.ascontiguousarray(array[:, rows.begin : rows.end].T) if rows.transposed else array

    def values(self, name: str, begin: int, end: int) -> npt.NDArray[Any]:
        """A tensor's values from `begin` to `end`, flat and as they are stored."""
        file, spec = self._tensors[name]
        size = ITEMSIZE[spec.dtype]
        data = self._files[file].read(spec.begin + begin * size, (end - begin) * size)
        return np.frombuffer(data, STORAGE[spec.dtype])

    def headers(self) -> Iterator[tuple[str, Header]]:
        """Every file by name, with its tensors as they are stored."""
        for file in self._files:
            tensors = {name: spec for name, (place, spec) in self._tensors.items() if place == file}
            yield file, Header(tensors, self._metadata[file])

    def index_metadata(self) -> dict[str, Any] | None:
        """The `metadata` of the index file, if the checkpoint has one."""
        path = self.folder / INDEX_NAME
        if not path.is_file():
            return None
        found = read_json(path).get("metadata")
        return found if isinstance(found, dict) else None

    def parameters(self) -> int:
        """Scalars in all tensors together."""
        return sum(math.prod(spec.shape) for _, spec in self._tensors.values())

    def identity(self) -> str:
        """A digest of what tells it from another without reading its weights.

        Names, sizes, times of change and headers of its files, and its configuration.
        """
        digest = hashlib.sha256((self.folder / CONFIG_NAME).read_bytes())
        for file in sorted(self._files):
            info = (self.folder / file).stat()
            digest.update(f"\0{file}\0{info.st_size}\0{info.st_mtime_ns}".encode())
        for name, (file, spec) in sorted(self._tensors.items()):
            digest.update(f"\0{name}\0{file}\0{spec}".encode())
        return digest.hexdigest()[:16]

    def _index(self) -> dict[str, str] | None:
        """Tensor → file, or None where the folder has one file."""
        listed = read_index(self.folder)
        if listed is None and not (self.folder / WEIGHTS_NAME).is_file():
            raise CheckpointError(
                f"{self.folder}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found neither",
                hint=without_weights(self.folder),
            )
        return listed

    def _open(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing, though {INDEX_NAME} names it", hint="Fetch the file again."
            )
        disk = DiskFile(path)
        try:
            length = header_bytes(disk.read(0, min(disk.size, PREFIX_BYTES)), disk.size, str(path))
            header = read_header(disk.read(0, length), str(path), size=disk.size, foreign=True)
        except IntegrityError as error:
            raise CheckpointError(
                f"{path}: not a safetensors file, or not all of it: "
                f"{error.message.removeprefix(f'{path}: ')}",
                hint=damaged(bytes(disk.read(0, min(disk.size, 64)))),
            ) from error
        self._files[file] = disk
        self._metadata[file] = _metadata(disk.read(PREFIX_BYTES, length - PREFIX_BYTES))
        for name, spec in header.items():
            if name in self._tensors:
                raise CheckpointError(f"{path}: {name}: stands in {self._tensors[name][0]} too")
            self._tensors[name] = file, spec

    def _check_index(self, listed: dict[str, str]) -> None:
        for name, file in listed.items():
            found = self._tensors.get(name, (None,))[0]
            if found != file:
                raise CheckpointError(
                    f"{self.folder / INDEX_NAME}: {name}: expected in {file}, found "
                    f"{f'in {found}' if found else 'nowhere'}",
                    hint="Fetch the checkpoint again.",
                )


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor → file as a folder's index has it, None without one. Raises `CheckpointError`."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    listed = read_json(path).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(file, str) and is_plain(file) for file in listed.values())
    ):
        raise CheckpointError(
            f"{path}: weight_map: expected tensors with the .safetensors files beside it"
        )
    return listed


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` for what is none, or over 256 MiB."""
    return read_object(path, _MAX_JSON_BYTES, CheckpointError)


def _metadata(header: memoryview) -> dict[str, str]:
    """Of a header that `read_header` has checked."""
    found: dict[str, str] = json.loads(bytes(header)).get("__metadata__", {})
    return found


def is_plain(file: str) -> bool:
    """Whether a name is one that a weights file beside config.json may have."""
    return file == Path(file).name and file.endswith(".safetensors") and not file.startswith(".")
