"""What uploads to any server share: what is there already, and what this machine has sent.

A server does not say the sha256 of its files. What is there is known from its manifest, and
from a journal on this machine: a line for every file sent since, with the tag the server gave
it. A line counts if the server still shows that tag and length. So a push that was stopped
goes on, and one that was stopped over an older version does not trust that version's manifest.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

import msgspec
from evermind_manifests.errors import EvermindPackError, MissingFileError, NetworkError
from evermind_manifests.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    FileEntry,
    Manifest,
    Sha256,
    parse_manifest,
)
from msgspec import Struct

from ..stores.options import RemoteOptions
from ..stores.remote import StreamStore, TransientError
from .source import Source
from .targets import Target

_LONGEST_PAUSE = 10.0


class _Sent(Struct, frozen=True):
    path: str
    sha256: Sha256
    bytes: int
    tag: str | None


_SENT = msgspec.json.Decoder(_Sent)


class UploadTarget(Target):
    """A package folder on a server; files overwrite what is there, the manifest last."""

    def __init__(self, location: str, store: StreamStore, options: RemoteOptions) -> None:
        """`store` reads the same place."""
        self.location = location
        self._store = store
        self._options = options
        key = hashlib.sha256(location.encode()).hexdigest()
        self._journal = options.cache_folder / "pushes" / f"{key}.jsonl"
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def send(self, path: str, size: int, open_body: Callable[[], object]) -> str | None:
        """One attempt to store a file; the tag it got. Raises `TransientError`, `NetworkError`."""

    @abstractmethod
    def look(self, path: str) -> tuple[int, str | None]:
        """A file's length and tag on the server. Raises `MissingFileError`, `TransientError`."""

    def prepare(self, manifest: Manifest, digest: str) -> None:
        """See `Target.prepare`."""
        try:
            data = self._store.read(MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
            current = parse_manifest(data)
            self._known = {path: entry.sha256 for path, entry in current.files.items()}
        except MissingFileError:
            self._known = {}
        except (NetworkError, TransientError):
            raise
        except EvermindPackError:
            self._known = {}  # no package, or one of another kind: replace all of it
        for sent in self._read_journal().values():
            self._known.pop(sent.path, None)
            entry = FileEntry(bytes=sent.bytes, sha256=sent.sha256)
            if manifest.files.get(sent.path) == entry and self._still_there(sent):
                self._known[sent.path] = sent.sha256

    def holds(self, path: str, entry: FileEntry) -> bool:
        """See `Target.holds`."""
        return self._known.get(path) == entry.sha256

    def put(self, path: str, entry: FileEntry, source: Source) -> None:
        """See `Target.put`: checked before it is sent."""
        source.check(path)
        tag = self._repeat(path, entry.bytes, lambda: source.open(path))
        self._note(_Sent(path, entry.sha256, entry.bytes, tag))

    def finish(self, manifest: bytes, signature: bytes | None) -> None:
        """See `Target.finish`."""
        if signature is not None:
            self._repeat(SIGNATURE_NAME, len(signature), lambda: signature)
        self._repeat(MANIFEST_NAME, len(manifest), lambda: manifest)
        self._journal.unlink(missing_ok=True)

    def close(self) -> None:
        """See `Target.close`."""
        self._store.close()

    def _repeat(self, path: str, size: int, open_body: Callable[[], object]) -> str | None:
        failures = 0
        while True:
            try:
                return self.send(path, size, open_body)
            except TransientError as error:
                failures += 1
                self._pause(path, failures, error)

    def _still_there(self, sent: _Sent) -> bool:
        failures = 0
        while True:
            try:
                size, tag = self.look(sent.path)
            except MissingFileError:
                return False
            except TransientError as error:
                failures += 1
                self._pause(sent.path, failures, error)
                continue
            return size == sent.bytes and (sent.tag is None or tag == sent.tag)

    def _pause(self, path: str, failures: int, error: TransientError) -> None:
        if failures > self._options.retries:
            raise NetworkError(
                f"{self.location}: {path}: {error.reason} ({failures} attempts)",
                hint="What was sent is kept: the same command goes on from there.",
            )
        pause = min(self._options.backoff * 2 ** (failures - 1), _LONGEST_PAUSE)
        time.sleep(max(pause, min(error.pause, _LONGEST_PAUSE)))

    def _note(self, sent: _Sent) -> None:
        line = msgspec.json.encode(sent) + b"\n"
        with self._lock:
            self._journal.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)

    def _read_journal(self) -> dict[str, _Sent]:
        """The last line of every path; one cut short by a kill is dropped."""
        found: dict[str, _Sent] = {}
        for line in _lines(self._journal):
            try:
                sent = _SENT.decode(line)
            except msgspec.DecodeError:
                continue
            found[sent.path] = sent
        return found


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
