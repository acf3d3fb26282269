"""Which package was last seen at a location: what makes a cached one usable without network."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
from evermind_manifests.manifest import Sha256
from msgspec import Struct


class PackageRecord(Struct, frozen=True):
    """`location` (without secrets) held the package `digest`."""

    location: str
    digest: Sha256


_RECORD = msgspec.json.Decoder(PackageRecord)


class Records:
    """The folder `packages` of a cache."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "packages"

    def digest_of(self, location: str) -> str | None:
        """The package last seen there."""
        record = _read(self._path(location))
        return record.digest if record and record.location == location else None

    def note(self, location: str, digest: str) -> None:
        """Remember what was seen. Raises `OSError` where it cannot be written."""
        path = self._path(location)
        record = PackageRecord(location, digest)
        if _read(path) == record:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, name = tempfile.mkstemp(dir=self._folder, prefix=".", suffix=".json")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(record))
                file.flush()
                os.fsync(fd)
            Path(name).rename(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise

    def __iter__(self) -> Iterator[PackageRecord]:
        for path in sorted(self._folder.glob("[!.]*.json")):
            if record := _read(path):
                yield record

    def clear(self) -> None:
        """Forget all."""
        for path in self._folder.glob("*.json"):
            path.unlink(missing_ok=True)

    def _path(self, location: str) -> Path:
        return self._folder / f"{hashlib.sha256(location.encode()).hexdigest()}.json"


def _read(path: Path) -> PackageRecord | None:
    try:
        return _RECORD.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
