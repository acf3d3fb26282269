"""What a package being written has safely on disk, so that a writer that was cut off can go on.

A text file in the scratch folder: a first line says what is being written, each further one
names a shard that is complete and synced. The last line may be torn; what it named is written
again. No package contains it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from .errors import LocationError
from .location import read_head
from .manifest import Shard

JOURNAL_NAME: Final = ".journal"
_FORMAT: Final = "evermind.journal/1"
_MAX_BYTES: Final = 1 << 30


class _Head(msgspec.Struct, frozen=True):
    format: str
    key: dict[str, str]


class Found(NamedTuple):
    """What a journal says: the key it was begun with, and the shards, in the order written."""

    key: dict[str, str]
    shards: list[Shard]


def read_journal(folder: Path) -> Found | None:
    """The journal in a scratch folder; None where there is none that can be understood."""
    path = folder / JOURNAL_NAME
    try:
        data = None if path.is_symlink() else read_head(path, _MAX_BYTES)
    except LocationError:
        return None
    lines = (data or b"").split(b"\n")[:-1]  # what follows the last newline is torn
    try:
        head = msgspec.json.decode(lines[0], type=_Head)
    except (IndexError, ValueError):
        return None
    shards: list[Shard] = []
    with suppress(ValueError):  # what follows a line that is none was not written by us
        for line in lines[1:]:
            shards.append(msgspec.json.decode(line, type=Shard))
    return Found(head.key, shards) if head.format == _FORMAT else None


class Journal:
    """Appends to the journal of one scratch folder; each call returns when it is on the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, key: Mapping[str, str], shards: Iterable[Shard]) -> None:
        """Start anew with `shards`, in place of what is there."""
        temporary = self._folder / f"{JOURNAL_NAME}.new"
        temporary.unlink(missing_ok=True)
        head = msgspec.json.encode(_Head(_FORMAT, dict(key)))
        _append(temporary, b"\n".join([head, *map(msgspec.json.encode, shards), b""]))
        temporary.replace(self._folder / JOURNAL_NAME)
        sync(self._folder)
        sync(self._folder.parent)

    def add(self, shards: Iterable[Shard]) -> None:
        """Note shards, after syncing the files that hold them."""
        listed = list(shards)
        for file in {one.file for one in listed}:
            sync(self._folder / file)
        for place in {(self._folder / one.file).parent for one in listed}:
            for folder in (place, *place.relative_to(self._folder).parents):
                sync(self._folder / folder)
        lines = b"".join(msgspec.json.encode(one) + b"\n" for one in listed)
        _append(self._folder / JOURNAL_NAME, lines)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _append(path: Path, data: bytes) -> None:
    """All of it, or nothing: what comes after half a line could not be read."""
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.truncate(path, size)
            raise
