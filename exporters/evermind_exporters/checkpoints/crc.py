"""The CRC-32 trailer of `EVL0` and `EVD0` files (specs/evermind-formats.md, section 10)."""

from __future__ import annotations

import struct
import zlib

from evermind_manifests.errors import CheckpointError

TRAILER_MAGIC = 0x52435645
TRAILER_BYTES = 8

_TRAILER = struct.Struct("<II")


def with_trailer(data: bytes) -> bytes:
    """`data` followed by the 8-byte trailer: u32 magic, u32 CRC-32 of `data`."""
    return data + _TRAILER.pack(TRAILER_MAGIC, zlib.crc32(data))


def check_trailer(data: memoryview, where: str) -> memoryview:
    """The bytes before the trailer that ends `data`.

    Raises `CheckpointError` when the trailer is missing or its CRC is not that of the bytes.
    """
    if len(data) < TRAILER_BYTES:
        raise CheckpointError(
            f"{where}: CRC trailer: expected {TRAILER_BYTES} bytes, found {len(data)}"
        )
    body = data[:-TRAILER_BYTES]
    check_crc(data[-TRAILER_BYTES:], zlib.crc32(body), where)
    return body


def check_crc(trailer: memoryview, computed: int, where: str) -> None:
    """Raise `CheckpointError` unless the 8-byte `trailer` states the CRC that was computed."""
    magic, stored = _TRAILER.unpack(trailer)
    if magic != TRAILER_MAGIC:
        raise CheckpointError(
            f"{where}: CRC trailer: expected magic 0x{TRAILER_MAGIC:08X}, found 0x{magic:08X}"
        )
    if computed != stored:
        raise CheckpointError(
            f"{where}: CRC-32: expected 0x{stored:08X} (trailer), found 0x{computed:08X}",
            hint="The file was changed or damaged after it was written.",
        )
