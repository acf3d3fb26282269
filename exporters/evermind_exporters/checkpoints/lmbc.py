"""`LMBC` versions 1 (f32) and 2 (f16): the limbic model.

Source: specs/evermind-formats.md, section 7.7. `rewardWeight` is not stored: a model read
back has the default.
"""

from __future__ import annotations

from evermind_manifests.dtypes import Rounding

from .checkpoint import Checkpoint, Layout, read_plain, write_plain

LAYOUT = Layout("LMBC", 0x4C4D4243, "limbic")


def read_lmbc(data: bytes | memoryview, where: str) -> Checkpoint:
    """Read a whole file; raises `CheckpointError` unless every byte is accounted for."""
    return read_plain(LAYOUT, memoryview(data), where)


def write_lmbc(
    checkpoint: Checkpoint, half: bool = False, rounding: Rounding = "truncate"
) -> bytes:
    """The file's bytes; half values are truncated by default, as the peer writes them."""
    return write_plain(LAYOUT, checkpoint, half, rounding)
