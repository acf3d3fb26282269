"""The peer's GGUF export of a language model, byte for byte; it is written, not read.

GGUF version 3: header, typed key-value pairs, tensor descriptions, then the data, aligned to
32 bytes. No program but the peer's knows the architecture "evermind", and the file has no
tokenizer. Source: specs/evermind-formats.md, section 13.
"""

from __future__ import annotations

import struct
from typing import Final

from evermind_manifests import dtypes
from evermind_manifests.dtypes import Rounding
from evermind_manifests.errors import CheckpointError

from .checkpoint import Checkpoint, in_order
from .params import canonical_shapes

MAGIC: Final = b"GGUF"
VERSION: Final = 3
ALIGNMENT: Final = 32

_U32, _STRING = 4, 8
_F32, _F16 = 0, 1
_KEYS: Final = {
    "evermind.vocab_size": "vocabSize",
    "evermind.embedding_length": "dModel",
    "evermind.block_count": "numLayers",
    "evermind.conv_kernel": "convKernel",
    "evermind.feed_forward_length": "hiddenDim",
    "evermind.expert_count": "numExperts",
    "evermind.expert_used_count": "topK",
}


def write_peer_gguf(
    checkpoint: Checkpoint,
    half: bool = False,
    rounding: Rounding = "truncate",
    name: str = "Evermind",
) -> bytes:
    """The file's bytes; raises `CheckpointError` for another family or wrong tensors."""
    if checkpoint.family != "evermind-lm":
        raise CheckpointError(
            f"the peer exports only 'evermind-lm' as GGUF, found {checkpoint.family!r}"
        )
    shapes = canonical_shapes(checkpoint.family, checkpoint.config)
    tensors = in_order(checkpoint.tensors, shapes, "GGUF")
    pairs = [_pair("general.architecture", "evermind"), _pair("general.name", name)]
    pairs += [_pair(key, checkpoint.config[field]) for key, field in _KEYS.items()]
    pairs.append(_pair("general.alignment", ALIGNMENT))
    header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(pairs)), *pairs]
    data: list[bytes] = []
    offset = 0
    for tensor_name, tensor in tensors.items():
        stored: bytes = dtypes.encode(tensor, "f16" if half else "f32", rounding).tobytes()
        padding = -offset % ALIGNMENT
        offset += padding
        rank = tensor.ndim
        header.append(
            _text(tensor_name)
            + struct.pack(f"<I{rank}QIQ", rank, *tensor.shape[::-1], _F16 if half else _F32, offset)
        )
        data += [bytes(padding), stored]
        offset += len(stored)
    head = b"".join(header)
    return b"".join([head, bytes(-len(head) % ALIGNMENT), *data])


def _pair(key: str, value: str | int) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", _STRING) + _text(value)
    return _text(key) + struct.pack("<II", _U32, value)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
