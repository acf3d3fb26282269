"""`EVD0`: the rows of a model that changed, and their new values.

    0   u32  magic 0x30445645      8   u32  row size R
    4   u32  version 1             12  u32  row count n
    16  n u32 row numbers, ascending; n*R f32 values; then the CRC trailer of `EVL0`

Two uses, told apart by the user: a delta between two models' parameters (`create_delta`,
`apply_delta`), and one between two files' 32-bit words (`diff_checkpoints`,
`apply_checkpoint_diff`). Values are absolute. Source: specs/evermind-formats.md, section 11.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import CheckpointError

from .checkpoint import Checkpoint, check_length, in_order, read_header, split
from .crc import TRAILER_BYTES, check_trailer, with_trailer
from .evl0 import LAYOUT as EVL0
from .params import canonical_shapes, dim_names

MAGIC: Final = 0x30445645
VERSION: Final = 1

_HEADER = struct.Struct("<4I")


@dataclass(frozen=True, slots=True)
class Delta:
    """`rows` `(n,)` uint32, strictly ascending; `values` `(n, R)` float32, `R >= 1`."""

    rows: npt.NDArray[np.uint32]
    values: npt.NDArray[np.float32]


def read_delta(data: bytes | memoryview, where: str) -> Delta:
    """Read a whole file, strictly; raises `CheckpointError`."""
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size + TRAILER_BYTES:
        raise CheckpointError(
            f"{where}: EVD0: expected at least {_HEADER.size + TRAILER_BYTES} bytes, "
            f"found {len(view)}"
        )
    magic, version, row_size, count = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise CheckpointError(f"{where}: magic: expected 0x{MAGIC:08X} (EVD0), found 0x{magic:08X}")
    if version != VERSION:
        raise CheckpointError(f"{where}: EVD0 version: expected 1, found {version}")
    if row_size == 0:
        raise CheckpointError(f"{where}: row size: expected 1 or more, found 0")
    split_at = _HEADER.size + 4 * count
    expected = split_at + 4 * count * row_size + TRAILER_BYTES
    if len(view) != expected:
        raise CheckpointError(
            f"{where}: length: expected {expected} bytes for {count} rows of {row_size}, "
            f"found {len(view)}"
        )
    body = check_trailer(view, where)
    rows = np.frombuffer(body[_HEADER.size : split_at], "<u4")
    if np.any(rows[1:] <= rows[:-1]):
        raise CheckpointError(f"{where}: rows: expected ascending numbers, each once")
    values = np.frombuffer(body[split_at:], "<f4").reshape(count, row_size)
    return Delta(rows, values)


def write_delta(delta: Delta) -> bytes:
    """The file's bytes."""
    count, row_size = delta.values.shape
    header = _HEADER.pack(MAGIC, VERSION, row_size, count)
    rows = delta.rows.astype("<u4").tobytes()
    return with_trailer(header + rows + delta.values.astype("<f4").tobytes())


def create_delta(base: Checkpoint, current: Checkpoint, eps: float = 0.0) -> Delta:
    """The rows of `current`'s parameters in which any differs from `base` by more than `eps`.

    Rows are `dModel` wide where that divides the parameter count, else one parameter; they
    do not stop at tensor borders. A half base counts as the float32 values it decodes to.
    Raises `CheckpointError` unless both are language models of one shape, or if a parameter
    becomes or was NaN, which the format cannot say.
    """
    _check_same_model(base, current)
    before, after = _flat(base), _flat(current)
    width = base.config["dModel"]
    return _changed_rows(before, after, width if after.size % width == 0 else 1, eps, "parameter")


def apply_delta(base: Checkpoint, delta: Delta) -> Checkpoint:
    """`base` with the delta's rows put in. Raises `CheckpointError` if they do not fit."""
    if base.family != EVL0.family:
        raise CheckpointError(f"EVD0: base: expected {EVL0.family!r}, found {base.family!r}")
    flat = _put(_flat(base), delta, "EVD0")
    tensors = split(flat, canonical_shapes(base.family, base.config))
    return Checkpoint(base.family, base.config, tensors)


def diff_checkpoints(base: bytes, current: bytes) -> bytes:
    """An `EVD0` file with the 32-bit words of `EVL0` file `current` that differ from `base`.

    CRC trailers do not count. Raises `CheckpointError` unless both are whole float32 `EVL0`
    files of one size: words of a half file can look like NaN and would be missed.
    """
    before, after = _words(base, "base"), _words(current, "current")
    if before.size != after.size:
        raise CheckpointError(
            f"current: length: expected {before.size} words (base), found {after.size}"
        )
    return write_delta(_changed_rows(before, after, 1, 0.0, "word"))


def apply_checkpoint_diff(base: bytes, delta: bytes) -> bytes:
    """The `EVL0` file that `diff_checkpoints` saw as `current`, with a fresh CRC trailer."""
    result = _put(_words(base, "base"), read_delta(delta, "delta"), "delta").tobytes()
    _words(result, "result")
    return with_trailer(result)


def _changed_rows(
    before: npt.NDArray[np.float32],
    after: npt.NDArray[np.float32],
    row_size: int,
    eps: float,
    unit: str,
) -> Delta:
    if not eps >= 0:
        raise CheckpointError(f"EVD0: eps: expected 0 or more, found {eps}")
    unseen = np.isnan(before) != np.isnan(after)
    if unseen.any():
        raise CheckpointError(
            f"EVD0: {unit} {int(np.argmax(unseen))} changes to or from NaN, which a delta "
            f"does not see"
        )
    with np.errstate(invalid="ignore"):
        difference = np.abs(after.astype(np.float64) - before.astype(np.float64))
    changed = (difference > eps).reshape(-1, row_size).any(axis=1)
    rows = np.flatnonzero(changed).astype(np.uint32)
    return Delta(rows, after.reshape(-1, row_size)[rows])


def _put(base: npt.NDArray[np.float32], delta: Delta, where: str) -> npt.NDArray[np.float32]:
    row_size = delta.values.shape[1]
    if base.size % row_size:
        raise CheckpointError(
            f"{where}: row size: expected a divisor of {base.size} values, found {row_size}"
        )
    rows = base.size // row_size
    if delta.rows.size and delta.rows[-1] >= rows:
        raise CheckpointError(f"{where}: row {delta.rows[-1]}: the base has {rows}")
    result = base.reshape(rows, row_size).copy()
    result[delta.rows] = delta.values
    return result.reshape(-1)


def _check_same_model(base: Checkpoint, current: Checkpoint) -> None:
    for name, checkpoint in (("base", base), ("current", current)):
        if checkpoint.family != EVL0.family:
            raise CheckpointError(
                f"EVD0: {name}: expected {EVL0.family!r}, found {checkpoint.family!r}"
            )
    for key in dim_names(EVL0.family):
        if base.config[key] != current.config[key]:
            raise CheckpointError(
                f"EVD0: current: {key}: expected {base.config[key]} (base), "
                f"found {current.config[key]}"
            )


def _flat(checkpoint: Checkpoint) -> npt.NDArray[np.float32]:
    shapes = canonical_shapes(checkpoint.family, checkpoint.config)
    ordered = in_order(checkpoint.tensors, shapes, "EVD0")
    return np.concatenate([tensor.ravel() for tensor in ordered.values()])


def _words(data: bytes, where: str) -> npt.NDArray[np.float32]:
    """A whole float32 `EVL0` file as words, without its trailer, whose CRC must be right."""
    view = memoryview(data).cast("B")
    header = read_header(EVL0, view, where)
    if header.half:
        raise CheckpointError(f"{where}: EVL0 version: expected 1 (f32), found 2 (f16)")
    check_length(EVL0, header, len(view), where)
    if len(view) > header.end:
        view = check_trailer(view, where)
    return np.frombuffer(view, "<f4")
