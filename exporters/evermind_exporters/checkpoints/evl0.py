"""`EVL0` versions 1 (f32) and 2 (f16): the language model, with or without a CRC trailer.

Source: specs/evermind-formats.md, section 10.
"""

from __future__ import annotations

from evermind_manifests.dtypes import Rounding

from .checkpoint import Checkpoint, Layout, check_length, read_header, read_plain, write_plain
from .crc import TRAILER_BYTES, check_trailer, with_trailer

LAYOUT = Layout("EVL0", 0x45564C30, "evermind-lm", TRAILER_BYTES)


def read_evl0(data: bytes | memoryview, where: str) -> Checkpoint:
    """Read a whole file, which ends after its last parameter (legacy) or after a valid trailer.

    Raises `CheckpointError` for any other length, a wrong CRC, or a bad header.
    """
    view = memoryview(data)
    header = read_header(LAYOUT, view, where)
    if len(view) > header.end:
        check_length(LAYOUT, header, len(view), where)
        check_trailer(view, where)
    return read_plain(LAYOUT, view, where)


def write_evl0(
    checkpoint: Checkpoint,
    half: bool = False,
    rounding: Rounding = "truncate",
    *,
    trailer: bool = True,
) -> bytes:
    """The file's bytes; half values are truncated by default, as the peer writes them.

    `trailer=False` gives the form of the peer's versions before 2026.6.34.
    """
    data = write_plain(LAYOUT, checkpoint, half, rounding)
    return with_trailer(data) if trailer else data
