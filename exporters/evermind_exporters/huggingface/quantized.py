"""Checkpoints in 8-bit and 4-bit floats, seen as if they held the numbers those stand for.

fp8: `X.weight` in E4M3 with `X.weight_scale_inv`, a factor for each block of rows and columns (or
for rows, or for all), or the same as `X` and `X_scale_inv`. mxfp4: `X_blocks` and `X_scales`, 32
numbers E2M1 with a common power of two, rows in the place of columns of the parameter X (OCP
Microscaling Formats, v1.0). A number is what transformers makes of it when it loads a checkpoint
with `dequantize=True` in float32; it is kept in bfloat16 where that holds all of them exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests.dtypes import count_nonfinite, decode
from evermind_manifests.errors import CheckpointError, UnsupportedError
from evermind_manifests.manifest import DType

from .checkpoint import Checkpoint, Rows
from .misfits import CONFIG_NAME

QUANTIZATION: Final = "quantization_config"
_FP8_METHODS, _MXFP4_METHOD = ("fp8", "mxfp8"), "mxfp4"
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
# Scales of activations, which nothing here rounds.
_UNUSED = ("activation_scale", "input_scale")
# Numbers made at a time: what it takes in between stays small.
_STEP: Final = 1 << 20

Floats: TypeAlias = npt.NDArray[np.float32]


class _Quantized(NamedTuple):
    """A tensor as it appears: made of codes and scales by `rows(expert, begin, end)`.

    `shape` is of what the codes stand for, as they lie. `turned`: it appears with its last two
    dimensions exchanged.
    """

    codes: str
    scales: str
    shape: tuple[int, ...]
    dtype: DType
    rows: Callable[[int, int, int], npt.NDArray[Any]]
    turned: bool

    @property
    def appears(self) -> tuple[int, ...]:
        """The shape it appears in."""
        shape = self.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.turned else shape


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, its numbers dequantised if it holds fp8 or mxfp4.

    Raises `UnsupportedError` for other quantized formats, `CheckpointError` as `Checkpoint` does
    and for scales that do not fit.
    """
    plain = Checkpoint(folder)
    method = _method(plain.config, folder / CONFIG_NAME)
    if method is None:
        return plain
    if method not in (*_FP8_METHODS, _MXFP4_METHOD):
        raise UnsupportedError(
            f"{folder / CONFIG_NAME}: {QUANTIZATION}: expected fp8, mxfp8 or mxfp4, found {method}",
            hint="Give a checkpoint that is not quantized.",
        )
    return DequantizedCheckpoint(folder)


def _method(config: dict[str, Any], file: Path) -> str | None:
    """How a checkpoint with this configuration is quantized, if it is."""
    found = config.get(QUANTIZATION)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(
            f"{file}: {QUANTIZATION}: expected an object, found {json.dumps(found)[:40]}"
        )
    return str(found.get("quant_method"))[:40] if found else None


class DequantizedCheckpoint(Checkpoint):
    """See the module."""

    def __init__(self, folder: Path) -> None:
        """Reads all scales once. Raises `CheckpointError` where they do not fit the weights."""
        super().__init__(folder)
        self._block = super().config[QUANTIZATION].get("weight_block_size")
        self._made: dict[str, _Quantized] = {}
        fp8 = {}
        for name, (_, spec) in self._tensors.items():
            if spec.foreign == "F8_E4M3":
                scales = name + _SCALE
                if scales not in self._tensors:
                    raise CheckpointError(f"{folder}: {name}: expected its scales, {scales}")
                fp8[name] = scales
            elif name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in self._tensors:
                one = self._mxfp4(name, name.removesuffix(_BLOCKS) + _SCALES)
                self._made[name.removesuffix(_BLOCKS)] = one
        exact = all(_is_short(self._factors(scales)) for scales in fp8.values())
        for name, scales in fp8.items():
            self._made[name] = self._fp8(name, scales, "bf16" if exact else "f32")
        used = {part for one in self._made.values() for part in (one.codes, one.scales)}
        plain = [name for name in self._tensors if name not in used and not name.endswith(_UNUSED)]
        self._names = [*plain, *self._made]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the same model, not quantized."""
        return {name: value for name, value in super().config.items() if name != QUANTIZATION}

    @property
    def names(self) -> list[str]:
        """Every tensor as it appears."""
        return list(self._names)

    def dtype(self, name: str) -> DType:
        """What its numbers are held in."""
        return self._made[name].dtype if name in self._made else super().dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._made[name].appears if name in self._made else super().shape(name)

    def read(self, rows: Rows) -> npt.NDArray[Any]:
        """See `Checkpoint.read`. Raises `CheckpointError` for a number that is too large."""
        one = self._made.get(rows.name)
        if one is None:
            return super().read(rows)
        if rows.height is not None:
            raise UnsupportedError(f"{rows.name}: quantized matrices one below the other")
        if rows.transposed == one.turned:
            return one.rows(rows.expert or 0, rows.begin, rows.end)
        whole = one.rows(rows.expert or 0, 0, one.shape[-2])
        return np.ascontiguousarray(whole.T[rows.begin : rows.end])

    def values(self, name: str, begin: int, end: int) -> npt.NDArray[Any]:
        """See `Checkpoint.values`."""
        if name not in self._made:
            return super().values(name, begin, end)
        height, width = self.shape(name)[-2:]
        # Rows are counted through all matrices.
        row, last = begin // width, -(-end // width)
        parts = []
        while row < last:
            expert, top = divmod(row, height)
            bottom = min(height, top + last - row)
            parts.append(self.read(Rows(name, expert, top, bottom)).reshape(-1))
            row += bottom - top
        return np.concatenate(parts)[begin % width :][: end - begin]

    def parameters(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(self.shape(name)) for name in self._names)

    def _fp8(self, codes: str, scales: str, dtype: DType) -> _Quantized:
        shape = super().shape(codes)
        if len(shape) not in (2, 3):
            raise CheckpointError(f"{self.folder}: {codes}: expected a matrix, found {list(shape)}")
        factors = self._factors(scales)
        height, width = shape[-2:]
        grid = factors.shape[-2:] if factors.ndim > 1 else (1, 1)
        factors = factors.reshape(-1, *grid)
        block = self._block_size(codes, (height, width), grid)
        if len(factors) not in (1, math.prod(shape[:-2])):
            raise CheckpointError(f"{self.folder}: {scales}: expected scales for {list(shape)}")

        def rows(expert: int, begin: int, end: int) -> npt.NDArray[Any]:
            found = np.empty((end - begin, width), np.float32)
            of = factors[expert if len(factors) > 1 else 0]
            step = max(1, _STEP // width)
            for top in range(begin, end, step):
                bottom = min(top + step, end)
                scale = of[np.arange(top, bottom) // block[0]]
                part = found[top - begin : bottom - begin]
                np.take(_E4M3, self._codes(codes, expert, top, bottom), out=part)
                part *= np.repeat(scale, block[1], axis=1)[:, :width]
            self._check(codes, found, "f32")
            if dtype == "f32":
                return found
            return (found.view(np.uint32) >> np.uint32(16)).astype(np.uint16)

        return _Quantized(codes, scales, shape, dtype, rows, turned=False)

    def _mxfp4(self, codes: str, scales: str) -> _Quantized:
        given, powers = super().shape(codes), super().shape(scales)
        if len(given) < 3 or given[:-1] != powers or given[-1] != 16:
            raise CheckpointError(
                f"{self.folder}: {codes}: expected blocks of 16 bytes and a scale for each, found "
                f"{list(given)} and {list(powers)}"
            )
        if {super().dtype(codes), super().dtype(scales)} != {"u8"}:
            raise CheckpointError(f"{self.folder}: {codes}: expected bytes")
        *_, height, blocks, _ = given
        shape = (*given[:-2], blocks * 32)

        def rows(expert: int, begin: int, end: int) -> npt.NDArray[Any]:
            found = np.empty((end - begin, blocks, 16), np.uint32)
            step = max(1, _STEP // (blocks * 32))
            for top in range(begin, end, step):
                bottom = min(top + step, end)
                at = (expert * height + top) * blocks, (expert * height + bottom) * blocks
                power = super(DequantizedCheckpoint, self).values(scales, *at)
                code = super(DequantizedCheckpoint, self).values(codes, at[0] * 16, at[1] * 16)
                index = code.reshape(-1, blocks, 16) + power.reshape(-1, blocks, 1) * np.intp(256)
                found[top - begin : bottom - begin] = _mxfp4_pairs()[index]
            numbers = found.view(np.uint16).reshape(end - begin, blocks * 32)
            self._check(codes, numbers, "bf16")
            return numbers

        return _Quantized(codes, scales, shape, "bf16", rows, turned=True)

    def _factors(self, scales: str) -> Floats:
        """Scales in float32; of one byte they are exponents (E8M0)."""
        _, spec = self._tensors[scales]
        raw = super().values(scales, 0, math.prod(spec.shape))
        if spec.dtype == "u8":
            return np.ldexp(np.float32(1), raw.astype(np.int32) - 127).reshape(spec.shape)
        floats: Floats = decode(raw.view(np.uint8), spec.dtype, spec.shape)
        return floats

    def _block_size(
        self, name: str, shape: tuple[int, int], grid: tuple[int, ...]
    ) -> tuple[int, int]:
        """Rows and columns of a block: the configuration's, or those that divide the matrix."""
        if isinstance(self._block, list) and len(self._block) == 2:
            tall, wide = self._block
            if all(isinstance(one, int) and one > 0 for one in self._block) and grid == (
                -(-shape[0] // tall),
                -(-shape[1] // wide),
            ):
                return tall, wide
        if not all(grid) or shape[0] % grid[0] or shape[1] % grid[1]:
            raise CheckpointError(
                f"{self.folder}: {name}: expected scales that divide {list(shape)} into blocks, "
                f"found {list(grid)}"
            )
        return shape[0] // grid[0], shape[1] // grid[1]

    def _codes(self, name: str, expert: int, begin: int, end: int) -> npt.NDArray[Any]:
        height, width = super().shape(name)[-2:]
        first = expert * height * width
        raw = super().values(name, first + begin * width, first + end * width)
        return raw.reshape(end - begin, width)

    def _check(self, name: str, numbers: npt.NDArray[Any], dtype: DType) -> None:
        if count_nonfinite(np.ascontiguousarray(numbers), dtype):
            raise CheckpointError(
                f"{self.folder}: {name}: holds numbers that are infinite, or NaN, in {dtype}",
                hint="The checkpoint is damaged, or its scales are not what they are taken for.",
            )


def _is_short(factors: Floats) -> bool:
    """Whether a product of E4M3 and any of these has at most the 8 bits of a bfloat16.

    Four are the number's; the factor may have four. Its exponent leaves room on both sides.
    """
    bits = factors.view(np.uint32)
    exponent = (bits >> np.uint32(23)) & np.uint32(0xFF)
    return not (bits & np.uint32(0xFFFFF)).any() and bool(
        ((exponent > 16) & (exponent < 240)).all()
    )


def _e4m3() -> Floats:
    """The value of each byte: a sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    values = np.where(code & 0x7F == 0x7F, np.nan, values)
    return np.where(code & 0x80, -values, values).astype(np.float32)


@cache
def _mxfp4_pairs() -> npt.NDArray[np.uint32]:
    """For each scale and byte (`256 * scale + byte`) its numbers in bfloat16, low half first."""
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
    values = np.concatenate([magnitude, -magnitude])
    byte = np.arange(256)
    power = np.ldexp(1.0, np.arange(256) - 127)[:, None]
    power[255] = np.nan  # E8M0 has no such power
    with np.errstate(over="ignore"):
        halves = [
            (values[nibble] * power).astype(np.float32).view(np.uint32) >> np.uint32(16)
            for nibble in (byte & 15, byte >> 4)
        ]
    pairs: npt.NDArray[np.uint32] = (halves[0] | halves[1] << np.uint32(16)).reshape(-1)
    return pairs


_E4M3: Final = _e4m3()
