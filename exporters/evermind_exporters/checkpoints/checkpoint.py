"""What all three checkpoint files share: a header of u32 words, then every parameter in order.

Readers are strict where the peer is not (specs/evermind-formats.md, end of section 6): the
version is 1 or 2, the length is exact, and the dimensions are checked against the length
before anything is allocated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from evermind_manifests import dtypes
from evermind_manifests.dtypes import Rounding
from evermind_manifests.errors import CheckpointError, ConfigError

from .params import Family, canonical_shapes, dim_names, parameter_count, validate_config

F32_VERSION = 1
HALF_VERSION = 2

Tensors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model of one of the three families, out of a file or on its way into one.

    `config` has the peer's keys and passes `validate_config`; `tensors` are float32 in
    canonical order, possibly read-only views of the file's bytes; `half` says whether the
    file held them as f16.
    """

    family: Family
    config: dict[str, Any]
    tensors: dict[str, npt.NDArray[np.float32]]
    half: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """One file format: its name, its magic word and the family it stores.

    `trailer_bytes` may follow the last parameter, or not.
    """

    name: str
    magic: int
    family: Family
    trailer_bytes: int = 0

    @property
    def header_bytes(self) -> int:
        """Magic, version and one word per dimension."""
        return 4 * (2 + len(dim_names(self.family)))


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; `end` is the offset after the last parameter."""

    config: dict[str, Any]
    half: bool
    count: int
    end: int


def read_header(layout: Layout, data: memoryview, where: str) -> Header:
    """Magic, version and dimensions; raises `CheckpointError` for any that cannot be right."""
    if len(data) < layout.header_bytes:
        raise CheckpointError(
            f"{where}: {layout.name} header: expected {layout.header_bytes} bytes, "
            f"found {len(data)}"
        )
    names = dim_names(layout.family)
    magic, version, *dims = struct.unpack_from(f"<{2 + len(names)}I", data)
    if magic != layout.magic:
        raise CheckpointError(
            f"{where}: magic: expected 0x{layout.magic:08X} ({layout.name}), found 0x{magic:08X}"
        )
    if version not in (F32_VERSION, HALF_VERSION):
        raise CheckpointError(
            f"{where}: {layout.name} version: expected 1 (f32) or 2 (f16), found {version}"
        )
    try:
        config = validate_config(layout.family, dict(zip(names, dims, strict=True)))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {layout.name} header: {error}") from error
    count = parameter_count(layout.family, config)
    half = version == HALF_VERSION
    return Header(config, half, count, layout.header_bytes + count * (2 if half else 4))


def check_length(layout: Layout, header: Header, size: int, where: str) -> None:
    """Raise `CheckpointError` unless a file with this header has exactly `size` bytes."""
    if size in (header.end, header.end + layout.trailer_bytes):
        return
    trailer = f", or {header.end + layout.trailer_bytes} with a CRC trailer"
    raise CheckpointError(
        f"{where}: length: expected {header.end} bytes for {header.count:,} "
        f"{'f16' if header.half else 'f32'} parameters{trailer if layout.trailer_bytes else ''}, "
        f"found {size}"
    )


def read_plain(layout: Layout, data: memoryview, where: str) -> Checkpoint:
    """A whole file; raises `CheckpointError` unless its length is exact. No trailer is read."""
    header = read_header(layout, data, where)
    check_length(layout, header, len(data), where)
    flat = _decode(data[layout.header_bytes : header.end], header.half, header.count)
    tensors = split(flat, canonical_shapes(layout.family, header.config))
    return Checkpoint(layout.family, header.config, tensors, header.half)


def write_plain(layout: Layout, checkpoint: Checkpoint, half: bool, rounding: Rounding) -> bytes:
    """The file's bytes without trailer.

    Raises `CheckpointError` for another family, or for tensors whose names or shapes are not
    those of the configuration.
    """
    if checkpoint.family != layout.family:
        raise CheckpointError(
            f"{layout.name}: family: expected {layout.family!r}, found {checkpoint.family!r}"
        )
    config = validate_config(layout.family, checkpoint.config)
    dims = [config[name] for name in dim_names(layout.family)]
    version = HALF_VERSION if half else F32_VERSION
    header = struct.pack(f"<{2 + len(dims)}I", layout.magic, version, *dims)
    shapes = canonical_shapes(layout.family, config)
    return header + b"".join(
        _encode(tensor, half, rounding)
        for tensor in in_order(checkpoint.tensors, shapes, layout.name).values()
    )


def in_order(
    tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, npt.NDArray[np.float32]]:
    """`tensors` in canonical order; raises `CheckpointError` unless exactly `shapes` are there."""
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise CheckpointError(f"{where}: tensor {unknown[0]!r} is not one of the family's")
    ordered = {}
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {name!r}: expected shape {shape}, found none")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r}: expected shape {shape}, found {tensors[name].shape}"
            )
        ordered[name] = np.asarray(tensors[name], dtype=np.float32)
    return ordered


def split(
    flat: npt.NDArray[np.float32], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Views of `flat` `(n,)`, one per shape, in order."""
    tensors = {}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        tensors[name] = flat[start:end].reshape(shape)
        start = end
    assert start == flat.size, f"{flat.size} values for shapes of {start}"
    return tensors


def _decode(body: memoryview, half: bool, count: int) -> npt.NDArray[np.float32]:
    flat = dtypes.decode(body, "f16" if half else "f32", (count,))
    # A package may place a checkpoint at any offset: an unaligned view would be slow.
    return np.require(flat, dtype=np.float32, requirements="A")


def _encode(tensor: npt.NDArray[np.float32], half: bool, rounding: Rounding) -> bytes:
    stored: bytes = dtypes.encode(tensor, "f16" if half else "f32", rounding).tobytes()
    return stored
