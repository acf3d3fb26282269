"""The peer's safetensors export of a language model, byte for byte.

Standard safetensors; what makes the bytes the peer's is the order: `__metadata__` first,
then the tensors in canonical order, compact JSON padded with spaces to a multiple of 8.
Source: specs/evermind-formats.md, section 13.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from evermind_manifests import dtypes
from evermind_manifests.dtypes import Rounding
from evermind_manifests.errors import CheckpointError

from .checkpoint import Checkpoint, in_order
from .params import canonical_shapes

METADATA: Final = {"format": "pt", "producer": "builderforce-memory-engine"}


def write_peer_safetensors(
    checkpoint: Checkpoint,
    half: bool = False,
    rounding: Rounding = "truncate",
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The file's bytes; `metadata` is added to the two entries the peer always writes.

    Raises `CheckpointError` for another family, or tensors that are not the configuration's.
    """
    if checkpoint.family != "evermind-lm":
        raise CheckpointError(
            f"the peer exports only 'evermind-lm' as safetensors, found {checkpoint.family!r}"
        )
    shapes = canonical_shapes(checkpoint.family, checkpoint.config)
    header: dict[str, Any] = {"__metadata__": {**METADATA, **(metadata or {})}}
    parts: list[bytes] = []
    offset = 0
    for name, tensor in in_order(checkpoint.tensors, shapes, "safetensors").items():
        stored: bytes = dtypes.encode(tensor, "f16" if half else "f32", rounding).tobytes()
        header[name] = {
            "dtype": "F16" if half else "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(stored)],
        }
        parts.append(stored)
        offset += len(stored)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
