"""`MoE0` versions 1 (f32) and 2 (f16): one shared-expert MoE layer.

Source: specs/evermind-formats.md, section 6. Version 3 is the package's shard, another format.
"""

from __future__ import annotations

from evermind_manifests.dtypes import Rounding

from .checkpoint import Checkpoint, Layout, read_plain, write_plain

LAYOUT = Layout("MoE0", 0x4D6F4530, "shared-expert-moe")


def read_moe0(data: bytes | memoryview, where: str) -> Checkpoint:
    """Read a whole file; raises `CheckpointError` unless every byte is accounted for."""
    return read_plain(LAYOUT, memoryview(data), where)


def write_moe0(
    checkpoint: Checkpoint, half: bool = False, rounding: Rounding = "truncate"
) -> bytes:
    """The file's bytes; half values are truncated by default, as the peer writes them."""
    return write_plain(LAYOUT, checkpoint, half, rounding)
