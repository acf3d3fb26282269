"""`.evermind`: a JSON manifest, a checkpoint, and for media models a codec section.

    0   u32  magic 0x45564D31       8   u32  manifest length M
    4   u32  container version 1    12  M bytes of JSON, then the checkpoint, then the codec

Source: specs/evermind-formats.md, section 12. The codec is carried through untouched. Strict
where the peer is not: the container version, every stated length and format, and the
manifest's dimensions against the checkpoint's own header are checked before any weight is
read or memory is taken.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from evermind_manifests.dtypes import Rounding
from evermind_manifests.errors import CheckpointError

from . import evl0, moe0
from .checkpoint import Checkpoint, Header, Layout, check_length, read_header
from .fnv import fnv1a
from .params import Family, dim_names, parameter_count
from .peer_manifest import (
    CHECKPOINT_FORMATS,
    CODEC_FORMAT,
    MAX_BYTES,
    PeerManifest,
    parse_peer_manifest,
)

MAGIC: Final = 0x45564D31
VERSION: Final = 1
PREFIX_BYTES: Final = 12

Read: TypeAlias = Callable[[int, int], memoryview]
"""`read(offset, length)` gives exactly these bytes, which the caller knows to be there."""

_LAYOUTS: Final[dict[Family, Layout]] = {
    "shared-expert-moe": moe0.LAYOUT,
    "evermind-lm": evl0.LAYOUT,
}


@dataclass(frozen=True, slots=True)
class Container:
    """Where the parts of an `.evermind` file lie; `codec_bytes` is 0 if there is none."""

    manifest: PeerManifest
    layout: Layout
    header: Header
    checkpoint_offset: int
    checkpoint_bytes: int
    codec_bytes: int


@dataclass(frozen=True, slots=True)
class EvermindFile:
    """A whole `.evermind` file in memory. `codec`: the bytes after the checkpoint, as they are."""

    manifest: PeerManifest
    checkpoint: Checkpoint
    codec: bytes


def read_container(read: Read, size: int, where: str) -> Container:
    """Find and check the parts of a file of `size` bytes; weights and checksums are not read.

    Raises `CheckpointError` for whatever contradicts the format or itself.
    """
    if size < PREFIX_BYTES:
        raise CheckpointError(f"{where}: .evermind header: expected 12 bytes, found {size}")
    magic, version, length = struct.unpack("<3I", read(0, PREFIX_BYTES))
    if magic != MAGIC:
        raise CheckpointError(
            f"{where}: magic: expected 0x{MAGIC:08X} (.evermind), found 0x{magic:08X}"
        )
    if version != VERSION:
        raise CheckpointError(f"{where}: container version: expected 1, found {version}")
    if length > min(MAX_BYTES, size - PREFIX_BYTES):
        raise CheckpointError(
            f"{where}: manifest: {length:,} bytes are stated; the file has {size:,}, "
            f"and a manifest at most {MAX_BYTES:,}"
        )
    manifest = parse_peer_manifest(bytes(read(PREFIX_BYTES, length)), where)
    offset = PREFIX_BYTES + length
    stated = manifest.checkpoint_bytes
    checkpoint_bytes = size - offset if stated is None else stated
    if checkpoint_bytes > size - offset:
        raise CheckpointError(
            f"{where}: manifest: checkpointBytes: {checkpoint_bytes:,} are stated, "
            f"{size - offset:,} follow the manifest"
        )
    layout = _LAYOUTS[manifest.family]
    head = read(offset, min(layout.header_bytes, checkpoint_bytes))
    header = read_header(layout, head, f"{where}: checkpoint")
    container = Container(
        manifest, layout, header, offset, checkpoint_bytes, size - offset - checkpoint_bytes
    )
    _check_consistent(container, where)
    return container


def check_sums(container: Container, checkpoint: int, codec: int, where: str) -> None:
    """Raise `CheckpointError` unless these FNV-1a sums are the manifest's."""
    values = container.manifest.values
    sums = [("checksum", checkpoint)]
    if container.codec_bytes and "codecChecksum" in values:
        sums.append(("codecChecksum", codec))
    for key, found in sums:
        if values[key] != found:
            raise CheckpointError(
                f"{where}: {key}: expected {values[key]} (manifest), found {found} (FNV-1a)",
                hint="The file was changed or damaged after it was written.",
            )


def read_evermind(data: bytes | memoryview, where: str) -> EvermindFile:
    """Read a whole file; raises `CheckpointError` for anything a reader can know to be wrong."""
    view = memoryview(data).cast("B")
    container = read_container(lambda offset, n: view[offset : offset + n], len(view), where)
    begin = container.checkpoint_offset
    end = begin + container.checkpoint_bytes
    check_sums(container, fnv1a(view[begin:end]), fnv1a(view[end:]), where)
    read = evl0.read_evl0 if container.layout is evl0.LAYOUT else moe0.read_moe0
    plain = read(view[begin:end], f"{where}: checkpoint")
    # The manifest's config has the seed and other keys that a checkpoint has no room for.
    checkpoint = Checkpoint(plain.family, container.manifest.config, plain.tensors, plain.half)
    return EvermindFile(container.manifest, checkpoint, bytes(view[end:]))


def write_evermind(
    checkpoint: Checkpoint,
    manifest: PeerManifest,
    *,
    half: bool = False,
    rounding: Rounding = "truncate",
    codec: bytes | memoryview = b"",
    trailer: bool = True,
) -> bytes:
    """The file's bytes. What `manifest` says of the checkpoint is brought up to date.

    If nothing changed since it was read, its text is used as it stands, and the file is the
    same byte for byte. `trailer=False` leaves out the CRC of an `EVL0` checkpoint, as the
    peer's versions before 2026.6.34 did. Raises `CheckpointError` if `manifest` is not this
    model's, or a media model comes without its codec.
    """
    family = checkpoint.family
    if family != manifest.family:
        raise CheckpointError(
            f".evermind: modelType: expected {family!r}, found {manifest.family!r} (manifest)"
        )
    for key in dim_names(family):
        if manifest.config[key] != checkpoint.config[key]:
            raise CheckpointError(
                f".evermind: {key}: expected {checkpoint.config[key]}, "
                f"found {manifest.config[key]} (manifest)"
            )
    if manifest.media and not codec:
        raise CheckpointError(".evermind: a media model's codec section is missing")
    if family == "evermind-lm":
        stored = evl0.write_evl0(checkpoint, half, rounding, trailer=trailer)
    else:
        stored = moe0.write_moe0(checkpoint, half, rounding)
    changes: dict[str, Any] = {"checksum": fnv1a(stored)}
    known = {
        "paramCount": parameter_count(family, checkpoint.config),
        "checkpointFormat": CHECKPOINT_FORMATS[family],
        "checkpointFp16": half,
    }
    # A file may leave these out; what it has must be right.
    changes |= {key: value for key, value in known.items() if key in manifest.values}
    if codec or manifest.checkpoint_bytes is not None:
        changes["checkpointBytes"] = len(stored)
    if codec and "codecChecksum" in manifest.values:
        changes["codecChecksum"] = fnv1a(codec)
    text = manifest.update(changes).text.encode()
    return struct.pack("<3I", MAGIC, VERSION, len(text)) + text + stored + bytes(codec)


def _check_consistent(container: Container, where: str) -> None:
    """The manifest against the checkpoint's header and the file's length."""
    manifest, header, layout = container.manifest, container.header, container.layout
    values = manifest.values
    for key in dim_names(manifest.family):
        if manifest.config[key] != header.config[key]:
            raise CheckpointError(
                f"{where}: {key}: expected {header.config[key]} (checkpoint header), "
                f"found {manifest.config[key]} (manifest)"
            )
    expected = {
        "paramCount": header.count,
        "checkpointFormat": layout.name,
        "checkpointFp16": header.half,
    }
    if manifest.media:
        expected["codecFormat"] = CODEC_FORMAT
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise CheckpointError(
                f"{where}: manifest: {key}: expected {value!r}, found {values[key]!r}"
            )
    check_length(layout, header, container.checkpoint_bytes, f"{where}: checkpoint")
    if manifest.media and container.codec_bytes == 0:
        raise CheckpointError(
            f"{where}: modality {values['modality']!r}: expected a codec section after the "
            f"checkpoint, found none"
        )
