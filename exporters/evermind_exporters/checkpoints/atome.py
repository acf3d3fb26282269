"""The Atome language model's packed files: `ATOME01`, `ATOME02` and `ATOMEP3`.

    7 bytes magic; embed; per block norm gamma, beta, conv, a_raw, b, c_out, Wq, Wk, Wv,
    router; final norm gamma, beta; unembed

A quantised tensor is an f32 alpha and its packed codes: two-bit (01), base-3 (02) or
power-of-three (P3), row-major; convolutions run backwards in time. Vectors are raw f32. All
little-endian and without padding, shapes, configuration or checksum: the dimensions come
from the caller, and the length must be exactly theirs. Source: specs/tilelli.md, section 6.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from evermind_manifests.errors import CheckpointError, ConfigError

from . import ternary
from .ternary import FloatArray, Quantised, Trits

MAGIC_BYTES: Final = 7
CLASSIFIER_MAGIC: Final = b"ATOMECL01"
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Layout:
    size: Callable[[int], int]
    pack: Callable[[Trits], Any]
    unpack: Callable[[Any, int, str], Trits]
    quantise: Callable[[FloatArray], Quantised]


_LAYOUTS: Final = {
    b"ATOME01": _Layout(
        ternary.two_bit_bytes, ternary.pack_two_bit, ternary.unpack_two_bit, ternary.ternarise
    ),
    b"ATOME02": _Layout(
        ternary.base3_bytes, ternary.pack_base3, ternary.unpack_base3, ternary.ternarise
    ),
    b"ATOMEP3": _Layout(
        ternary.power3_bytes, ternary.pack_power3, ternary.unpack_power3, ternary.power_of_three
    ),
}
VERSIONS: Final = tuple(magic.decode() for magic in _LAYOUTS)


@dataclass(frozen=True, slots=True)
class AtomeFile:
    """A file's content: its version and every tensor, by state-dict name.

    `quantised` holds codes with the state dict's shapes, `vectors` are float32.
    """

    version: str
    quantised: dict[str, Quantised]
    vectors: dict[str, FloatArray]

    def tensors(self) -> dict[str, FloatArray]:
        """The weights used, float32: `alpha * codes`, and the vectors."""
        return {name: q.values() for name, q in self.quantised.items()} | self.vectors


def is_atome(head: bytes) -> bool:
    """Whether a file that begins like this is one of these, or a classifier."""
    return head[:MAGIC_BYTES] in _LAYOUTS or head.startswith(CLASSIFIER_MAGIC)


def atome_bytes(version: str, config: Mapping[str, Any]) -> int:
    """The exact length of a file of a model with the resolved configuration `config`."""
    layout = _layout(version.encode(), version)
    return MAGIC_BYTES + sum(
        4 + layout.size(math.prod(shape)) if packed else 4 * math.prod(shape)
        for _, shape, packed in _order(config)
    )


def read_atome(data: bytes | memoryview, config: Mapping[str, Any], where: str) -> AtomeFile:
    """Read a whole file; `config` is the resolved configuration of the module `lm`.

    Raises `ConfigError` for a model these files cannot hold, `CheckpointError` for another
    magic, a length that is not the configuration's, codes that stand for nothing, or
    numbers that are not finite.
    """
    view = memoryview(data)
    magic = bytes(view[:MAGIC_BYTES])
    layout = _layout(magic, where, bytes(view[: len(CLASSIFIER_MAGIC)]))
    version = magic.decode()
    expected = atome_bytes(version, config)
    if len(view) != expected:
        raise CheckpointError(
            f"{where}: length: expected {expected:,} bytes for {version} with this "
            f"configuration, found {len(view):,}",
            hint="The file says nothing of its dimensions: check config.json.",
        )
    quantised: dict[str, Quantised] = {}
    vectors: dict[str, FloatArray] = {}
    position = MAGIC_BYTES
    for name, shape, packed in _order(config):
        place, count = f"{where}: {name}", math.prod(shape)
        if not packed:
            end = position + 4 * count
            vectors[name] = _floats(view[position:end], place)
        else:
            end = position + 4 + layout.size(count)
            alpha = _floats(view[position : position + 4], f"{place}: alpha")
            codes = layout.unpack(np.frombuffer(view[position + 4 : end], np.uint8), count, place)
            quantised[name] = Quantised(_turned(codes.reshape(shape)), alpha)
        position = end
    return AtomeFile(version, quantised, vectors)


def write_atome(file: AtomeFile, config: Mapping[str, Any]) -> bytes:
    """The file's bytes; what `read_atome` gave is written back byte for byte.

    Raises `CheckpointError` for tensors that are not the configuration's.
    """
    layout = _layout(file.version.encode(), file.version)
    parts = [file.version.encode()]
    found = {name: q.codes.shape for name, q in file.quantised.items()}
    found |= {name: vector.shape for name, vector in file.vectors.items()}
    for name, shape, packed in _order(config):
        if found.get(name) != shape or packed != (name in file.quantised):
            raise CheckpointError(
                f"{file.version}: tensor {name!r}: expected shape {shape}, found {found.get(name)}"
            )
        if packed:
            one = file.quantised[name]
            parts.append(struct.pack("<f", *one.alpha))
            parts.append(layout.pack(_turned(one.codes).reshape(-1)).tobytes())
        else:
            parts.append(file.vectors[name].astype("<f4").tobytes())
    return b"".join(parts)


def quantise_atome(
    version: str, config: Mapping[str, Any], tensors: Mapping[str, FloatArray]
) -> AtomeFile:
    """What a file of `version` holds of a state dict of shadow weights."""
    layout = _layout(version.encode(), version)
    names = {name: packed for name, _, packed in _order(config)}
    return AtomeFile(
        version,
        {name: layout.quantise(tensors[name]) for name, packed in names.items() if packed},
        {name: tensors[name] for name, packed in names.items() if not packed},
    )


def _layout(magic: bytes, where: str, head: bytes = b"") -> _Layout:
    if head == CLASSIFIER_MAGIC:
        raise CheckpointError(
            f"{where}: an ATOMECL01 file holds a classifier, not a language model",
            hint="Export the language model it was made from.",
        )
    if magic not in _LAYOUTS:
        raise CheckpointError(
            f"{where}: magic: expected that of {', '.join(VERSIONS)}, found {magic!r}"
        )
    return _LAYOUTS[magic]


def _order(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape, bool]]:
    """(name, shape, whether it is packed) of every tensor in file order."""
    plain = config["pathways"] == 3 and config["n_banks"] == 1 and not config["disable_pathways"]
    if not plain or config["per_row"] or config["fp_attention"]:
        raise ConfigError(
            "tilelli lm config: these files hold three pathways of one bank, all of them "
            "quantised by tensor; the configuration says otherwise"
        )
    d, head, kernel = config["d_model"], config["d_head"], config["kernel_size"]
    table = (config["vocab_size"], d)
    yield "embed.weight", table, True
    for layer in range(config["n_layers"]):
        prefix = f"blocks.{layer}."
        yield prefix + "norm.weight", (d,), False
        yield prefix + "norm.bias", (d,), False
        yield prefix + "local.weight", (d, 1, kernel), True
        for name in ("a_raw", "b", "c_out"):
            yield f"{prefix}state.{name}", (d,), False
        for name, rows in (("Wq", head), ("Wk", head), ("Wv", d)):
            yield f"{prefix}sparse.{name}.weight", (rows, d), True
        yield prefix + "router.proj.weight", (3, d), True
    yield "final_norm.weight", (d,), False
    yield "final_norm.bias", (d,), False
    yield "unembed.weight", table, True


def _turned(codes: Trits) -> Trits:
    """Convolutions (d, 1, k) with the time axis the other way round."""
    return codes[..., ::-1] if codes.ndim == 3 else codes


def _floats(data: memoryview, where: str) -> FloatArray:
    array = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(array).all():
        raise CheckpointError(f"{where}: expected finite numbers, found an infinity or NaN")
    return array
