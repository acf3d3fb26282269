"""A `.safetensors` file with a model in it, read tensor by tensor.

Places are read, not mapped: the pages of a mapping count as the process's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from evermind_manifests import dtypes
from evermind_manifests.errors import CheckpointError, IntegrityError
from evermind_manifests.safetensors_header import PREFIX_BYTES, header_bytes, read_header

from .blueprint import FloatArray
from .checkpoints.disk_file import DiskFile
from .family import Shape

_FLOAT_DTYPES = ("f32", "f16", "bf16", "f64")


class SafetensorsFile(Mapping[str, FloatArray]):
    """A `.safetensors` file's tensors as float32 arrays, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._disk = DiskFile(path)
        try:
            prefix = self._disk.read(0, min(self._disk.size, PREFIX_BYTES))
            length = header_bytes(prefix, self._disk.size, str(path))
            header = read_header(self._disk.read(0, length), str(path), size=self._disk.size)
        except IntegrityError as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error.message}") from error
        self._tensors = header

    def __getitem__(self, name: str) -> FloatArray:
        spec = self._tensors[name]
        data = self._disk.read(spec.begin, spec.end - spec.begin)
        array = dtypes.decode(data, spec.dtype, spec.shape)
        if array.dtype != np.float64:
            return array.astype(np.float32, copy=False)
        with np.errstate(over="ignore"):
            single: FloatArray = array.astype(np.float32)
        if not np.array_equal(np.isinf(single), np.isinf(array)):
            raise CheckpointError(
                f"{self._path}: {name}: expected numbers that float32 holds, found "
                f"{np.abs(array).max():g}"
            )
        return single

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def rename(self, canonical: Callable[[str], str | None]) -> None:
        """Go by other names, and drop what has none.

        Raises `CheckpointError` if two tensors would get the same one.
        """
        names: dict[str, str] = {}
        for stored in self._tensors:
            name = canonical(stored)
            if name is None:
                continue
            if name in names:
                raise CheckpointError(f"{self._path}: {names[name]} and {stored} are the same")
            names[name] = stored
        self._tensors = {name: self._tensors[stored] for name, stored in names.items()}

    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor."""
        return {name: spec.shape for name, spec in self._tensors.items()}

    def check(self, shapes: Mapping[str, Shape], source: str) -> None:
        """Raise `CheckpointError` unless the file holds exactly these tensors, as floats.

        `source` is the file whose configuration gives the shapes.
        """
        check_shapes(self.shapes(), shapes, str(self._path), source)
        for name, spec in self._tensors.items():
            if spec.dtype not in _FLOAT_DTYPES:
                raise CheckpointError(
                    f"{self._path}: {name}: dtype: expected a float, found {spec.dtype.upper()}"
                )


def check_shapes(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str, source: str
) -> None:
    """Raise `CheckpointError` unless the tensors of `where` are those that `source` describes."""
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: not part of the model" for name in found if name not in expected]
    problems += [
        f"{name}: shape: expected {expected[name]}, found {shape}"
        for name, shape in found.items()
        if shape != expected.get(name, shape)
    ]
    if problems:
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "\n  ".join(sorted(problems)[:5])
        raise CheckpointError(f"{where}: does not match {source}:\n  {listed}{more}")
