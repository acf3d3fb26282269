"""The peer's files, in and out: `MoE0`, `EVL0`, `LMBC`, `EVD0`, `.evermind`, and exports."""

from __future__ import annotations

import struct

from evermind_manifests.errors import CheckpointError

from . import evl0, lmbc, moe0
from .checkpoint import Checkpoint
from .evd0 import (
    Delta,
    apply_checkpoint_diff,
    apply_delta,
    create_delta,
    diff_checkpoints,
    read_delta,
    write_delta,
)
from .evermind import EvermindFile, read_evermind, write_evermind
from .evl0 import read_evl0, write_evl0
from .lmbc import read_lmbc, write_lmbc
from .moe0 import read_moe0, write_moe0
from .params import (
    FAMILIES,
    Family,
    canonical_shapes,
    dim_names,
    ffn_shapes,
    parameter_count,
    validate_config,
)
from .peer_gguf import write_peer_gguf
from .peer_manifest import PeerManifest, new_peer_manifest, parse_peer_manifest
from .peer_safetensors import write_peer_safetensors

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Delta",
    "EvermindFile",
    "Family",
    "PeerManifest",
    "apply_checkpoint_diff",
    "apply_delta",
    "canonical_shapes",
    "create_delta",
    "diff_checkpoints",
    "dim_names",
    "ffn_shapes",
    "new_peer_manifest",
    "parameter_count",
    "parse_peer_manifest",
    "read_checkpoint",
    "read_delta",
    "read_evermind",
    "read_evl0",
    "read_lmbc",
    "read_moe0",
    "validate_config",
    "write_delta",
    "write_evermind",
    "write_evl0",
    "write_lmbc",
    "write_moe0",
    "write_peer_gguf",
    "write_peer_safetensors",
]

_READERS = {
    moe0.LAYOUT.magic: read_moe0,
    evl0.LAYOUT.magic: read_evl0,
    lmbc.LAYOUT.magic: read_lmbc,
}


def read_checkpoint(data: bytes | memoryview, where: str) -> Checkpoint:
    """Read any of the three files, told apart by their first word.

    `where` names the file in messages. Raises `CheckpointError` for an unknown magic or
    whatever the format's own reader refuses.
    """
    if len(data) < 4:
        raise CheckpointError(f"{where}: magic: expected 4 bytes, found {len(data)}")
    (magic,) = struct.unpack_from("<I", data)
    if magic not in _READERS:
        raise CheckpointError(
            f"{where}: magic: expected that of MoE0, EVL0 or LMBC, found 0x{magic:08X}"
        )
    return _READERS[magic](data, where)
