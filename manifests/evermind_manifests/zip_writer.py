"""One uncompressed zip from a folder of files: deterministic, members 4 KiB-aligned.

No clock, no permissions of the machine, order as given. The alignment is padding in an
extra field of the local header, id 0xD935 (as Android's zipalign writes it), so that a
member can be read with O_DIRECT or mapped. Source: PKWARE APPNOTE 6.3, section 4.3.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from .zip_store import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    END,
    END64,
    END64_SIGNATURE,
    END_SIGNATURE,
    FULL16,
    FULL32,
    LOCAL,
    LOCAL_SIGNATURE,
    LOCATOR64,
    LOCATOR64_SIGNATURE,
    UTF8_NAMES,
    ZIP64_EXTRA,
)

ALIGNMENT = 4096
ALIGNMENT_EXTRA = 0xD935

# 1980-01-01, the first day a zip can name.
_DATE = (0 << 9) | (1 << 5) | 1
_VERSION = 20
_VERSION_64 = 45
_MADE_ON_UNIX = 3 << 8
_MODE = (stat.S_IFREG | 0o644) << 16
_CHUNK = 1 << 20


def write_zip(folder: Path, names: Sequence[str], target: Path) -> None:
    """Move the files `names` of `folder` into the zip `target`, in this order.

    Each file is removed once it is copied, so the disk holds at most one of them twice.
    """
    entries: list[bytes] = []
    with target.open("xb") as out:
        for name in names:
            source = folder / name
            entries.append(_write_member(out, name, source))
            source.unlink()
        _write_directory(out, entries)


def _write_member(out: BinaryIO, name: str, source: Path) -> bytes:
    """Write one member; give its entry of the central directory."""
    header_at = out.tell()
    size = source.stat().st_size
    encoded = name.encode()
    large = size >= FULL32
    sizes = struct.pack("<2H2Q", ZIP64_EXTRA, 16, size, size) if large else b""
    unpadded = header_at + LOCAL.size + len(encoded) + len(sizes) + 6
    padding = bytes(-unpadded % ALIGNMENT)
    extra = sizes + struct.pack("<3H", ALIGNMENT_EXTRA, 2 + len(padding), ALIGNMENT) + padding
    version = _VERSION_64 if large else _VERSION
    flags = 0 if name.isascii() else UTF8_NAMES
    short = FULL32 if large else size
    out.seek(header_at + LOCAL.size + len(encoded) + len(extra))
    crc = 0
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
            out.write(chunk)
    end = out.tell()
    out.seek(header_at)
    out.write(
        LOCAL.pack(
            LOCAL_SIGNATURE, version, flags, 0, 0, _DATE, crc, short, short, len(encoded),
            len(extra),
        )
    )  # fmt: skip
    out.write(encoded + extra)
    out.seek(end)
    wide = [size, size] if large else []
    wide += [header_at] if header_at >= FULL32 else []
    central_extra = struct.pack(f"<2H{len(wide)}Q", ZIP64_EXTRA, 8 * len(wide), *wide)
    if not wide:
        central_extra = b""
    version = _VERSION_64 if wide else _VERSION
    return (
        CENTRAL.pack(
            CENTRAL_SIGNATURE, _MADE_ON_UNIX | version, version, flags, 0, 0, _DATE, crc, short,
            short, len(encoded), len(central_extra), 0, 0, 0, _MODE, min(header_at, FULL32),
        )
        + encoded
        + central_extra
    )  # fmt: skip


def _write_directory(out: BinaryIO, entries: Sequence[bytes]) -> None:
    begin = out.tell()
    for entry in entries:
        out.write(entry)
    end = out.tell()
    count, length = len(entries), end - begin
    if count >= FULL16 or begin >= FULL32 or length >= FULL32:
        out.write(
            END64.pack(
                END64_SIGNATURE, END64.size - 12, _MADE_ON_UNIX | _VERSION_64, _VERSION_64, 0, 0,
                count, count, length, begin,
            )
        )  # fmt: skip
        out.write(LOCATOR64.pack(LOCATOR64_SIGNATURE, 0, end, 1))
    out.write(
        END.pack(
            END_SIGNATURE, 0, 0, min(count, FULL16), min(count, FULL16), min(length, FULL32),
            min(begin, FULL32), 0,
        )
    )  # fmt: skip
