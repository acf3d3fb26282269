"""The content-addressed cache on disk: files named by their sha256, shared by processes.

    objects/ab/abcdef…      a blob, complete and verified; never changed, only removed
    partial/abcdef….part    one being downloaded, or left by a download that was killed
    packages/<key>.json     which package was last seen at a location (`records.py`)
    lock, usage             guards what follows; the bytes in objects/, at least

A blob becomes an object by a rename after its digest was checked and its bytes synced, so a
process killed at any point leaves only what the next one can use. All agreement between
processes is by `flock`, which the kernel drops with a dead process:

- on a `.part`, exclusive: one process downloads it, the others wait and find the object;
- on an object, shared: somebody reads it, so eviction passes it by;
- on `lock`, exclusive and short: room is made and an object added.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from evermind_manifests.errors import ChangedError, NetworkError

from .remote import Sink

_BLOCK: Final = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Someone else's download may stand still this long (s) before waiting for it is an error.
_STALLED = 60.0
# Objects are touched when used, but not more often than this (s).
_TOUCH_EVERY = 60.0
# After making room this share of the cache is in use, so that room is not made for each blob.
_LOW_WATER = 0.95


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the cache: `used` is when it was last read (seconds since the epoch)."""

    digest: str
    bytes: int
    used: float
    complete: bool


@dataclass(frozen=True, slots=True)
class Freed:
    """What was removed."""

    entries: int = 0
    bytes: int = 0


class WrongDigestError(Exception):
    """What was downloaded twice has another sha256; `found` is the last one."""

    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found


class DiskCache:
    """One cache folder. Safe to use from several threads and processes.

    `limit` bounds the bytes of objects and leftovers; what is in use is kept beyond it for
    as long as it is used, and downloads that run come on top. Methods raise `OSError` where
    the file system refuses.
    """

    def __init__(self, root: Path, limit: int) -> None:
        """Nothing is created before something is stored."""
        self.root = root
        self.limit = limit
        self._objects = root / "objects"
        self._partial = root / "partial"
        #: (digest, inode) of the objects this process has hashed.
        self._trusted: set[tuple[str, int]] = set()

    def find(self, digest: str) -> int | None:
        """A descriptor of the object, locked against eviction until it is closed; else None.

        An object is hashed when this process first uses it; a damaged one is removed.
        """
        path = self._object(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if not self._is_sound(fd, digest):
                with suppress(FileNotFoundError):
                    path.unlink()
                os.close(fd)
                return None
            self._touch(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def has(self, digest: str, size: int) -> bool:
        """Whether the object is there, by its length; it is not read."""
        try:
            return self._object(digest).stat().st_size == size
        except FileNotFoundError:
            return False

    def fetch(self, digest: str, size: int, download: Callable[[int, Sink], None]) -> int:
        """As `find`, downloading what is not there: `download(begin, sink)` gives the bytes
        from `begin` on.

        Goes on from what an earlier download left. Content of another digest is fetched once
        more, then `WrongDigestError` is raised. While another process downloads the same,
        waits for it; `NetworkError` if it stands still.
        """
        while True:
            if (fd := self.find(digest)) is not None:
                return fd
            part = self._claim(digest, size, wait=True)
            if part is not None:
                break
        try:
            if (fd := self.find(digest)) is not None:
                part.discard()
                return fd
            part.fill(download)
            return self._admit(part)
        finally:
            part.close()

    def claim(self, digest: str, size: int) -> Part | None:
        """The partial file to download into, or None if it is there or somebody is at it."""
        if self.has(digest, size):
            return None
        part = self._claim(digest, size, wait=False)
        if part is not None and self.has(digest, size):
            part.discard()
            part.close()
            return None
        return part

    def admit(self, part: Part) -> None:
        """Make a complete, claimed part an object. Raises `WrongDigestError`; it is then gone."""
        found = part.sha256()
        if found != part.digest:
            part.truncate()
            raise WrongDigestError(found)
        os.close(self._admit(part))

    def entries(self) -> Iterator[Entry]:
        """All objects and partial files, in no order."""
        for folder, complete in ((self._objects, True), (self._partial, False)):
            for path in sorted(folder.glob("*/*" if complete else "*.part")):
                with suppress(FileNotFoundError):
                    info = path.stat()
                    yield Entry(path.name[:64], info.st_size, info.st_mtime, complete)

    def evict(self, limit: int) -> Freed:
        """Remove what was used longest ago until `limit` bytes are left, but nothing in use."""
        with self._locked():
            return self._evict(limit)

    def remove(self, digest: str) -> bool:
        """Remove an object unless it is in use."""
        return self._drop(self._object(digest))

    def verify(self, progress: Callable[[int, int], None]) -> list[str]:
        """Hash every object and remove the damaged ones: their names. `progress(done, total)`."""
        entries = [entry for entry in self.entries() if entry.complete]
        total, done = sum(entry.bytes for entry in entries), 0
        damaged: list[str] = []
        for entry in entries:
            path = self._object(entry.digest)
            with suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if not _SHA256.fullmatch(entry.digest) or _hash(fd) != entry.digest:
                        damaged.append(path.name)
                        path.unlink()
                finally:
                    os.close(fd)
            done += entry.bytes
            progress(done, total)
        return damaged

    def _object(self, digest: str) -> Path:
        assert _SHA256.fullmatch(digest), "digests come from a checked manifest"
        return self._objects / digest[:2] / digest

    def _is_sound(self, fd: int, digest: str) -> bool:
        key = digest, os.fstat(fd).st_ino
        if key in self._trusted:
            return True
        if _hash(fd) != digest:
            return False
        self._trusted.add(key)
        return True

    @staticmethod
    def _touch(fd: int) -> None:
        now = time.time()
        if now - os.fstat(fd).st_mtime > _TOUCH_EVERY:
            # A cache that may only be read is used all the same.
            with suppress(OSError):
                os.utime(fd, (now, now))

    def _claim(self, digest: str, size: int, *, wait: bool) -> Part | None:
        """The `.part` with its lock; None if another has it (when waiting: had it until now)."""
        self._partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._partial / f"{digest}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            if not _lock_now(fd):
                if wait:
                    self._wait(fd, digest)
                os.close(fd)
                return None
            # The one who held it may have renamed or removed it meanwhile.
            if os.fstat(fd).st_nlink == 0 or not _is_at(fd, path):
                os.close(fd)
                return None
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        return Part(digest, size, path, fd)

    def _wait(self, fd: int, digest: str) -> None:
        """Wait until somebody else's download ends, in whatever way."""
        pause, seen, since = 0.002, -1, time.monotonic()
        while not _lock_now(fd):
            if self._object(digest).exists():
                return
            size = os.fstat(fd).st_size
            if size != seen:
                seen, since = size, time.monotonic()
            elif time.monotonic() - since > _STALLED:
                raise NetworkError(
                    f"{digest[:12]}…: another process is downloading it and has stood still for"
                    f" {_STALLED:.0f} s",
                    hint="End that process, or choose another cache folder (EVERMIND_CACHE).",
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def _admit(self, part: Part) -> int:
        """Rename a complete part to its object; a descriptor of it.

        If no room can be made, the bytes are only lent: the file is gone when that is closed.
        """
        os.fsync(part.fd)
        os.fchmod(part.fd, 0o444)
        target = self._object(part.digest)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked() as usage:
            used = usage.read()
            if used + part.size > self.limit >= part.size:
                self._evict(int(self.limit * _LOW_WATER) - part.size, sparing=part.path)
                used = usage.read()
            if used + part.size > self.limit:
                part.path.unlink()
            else:
                # First, so that a process killed in between leaves a number that is too high.
                usage.write(used + part.size)
                part.path.rename(target)
        fd = os.open(f"/proc/self/fd/{part.fd}", os.O_RDONLY | os.O_CLOEXEC)
        part.release()
        fcntl.flock(fd, fcntl.LOCK_SH)
        self._trusted.add((part.digest, os.fstat(fd).st_ino))
        return fd

    def _evict(self, limit: int, sparing: Path | None = None) -> Freed:
        """With `lock` held. Recounts `usage`."""
        found: list[tuple[float, int, Path]] = []
        for path in [*self._objects.glob("*/*"), *self._partial.glob("*.part")]:
            with suppress(FileNotFoundError):
                info = path.stat()
                found.append((info.st_mtime, info.st_size, path))
        used = sum(size for _, size, path in found if path != sparing)
        entries = freed = 0
        for _, size, path in sorted(found, key=lambda item: item[0]):
            if used <= limit:
                break
            if path != sparing and self._drop(path):
                used -= size
                freed += size
                entries += 1
        _Usage(self.root).write(used)
        return Freed(entries, freed)

    def _drop(self, path: Path) -> bool:
        """Unlink the file unless somebody holds its lock."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if not _lock_now(fd):
                return False
            path.unlink()
            return True
        except FileNotFoundError:
            return False
        finally:
            os.close(fd)

    @contextmanager
    def _locked(self) -> Iterator[_Usage]:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield _Usage(self.root)
        finally:
            os.close(fd)


class Part:
    """A `.part` file whose exclusive lock is held: a download's bytes from the start."""

    def __init__(self, digest: str, size: int, path: Path, fd: int) -> None:
        self.digest = digest
        self.size = size
        self.path = path
        self.fd = fd
        self._hash = hashlib.sha256()
        self.done = 0
        self._load()

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self.fd, view, self.done)
            self._hash.update(view[:count])
            self.done += count
            view = view[count:]

    def fill(self, download: Callable[[int, Sink], None]) -> None:
        """Complete it, starting over once if it turns out wrong. Raises `WrongDigestError`."""
        for last in (False, True):
            try:
                if self.done < self.size or not self.size:
                    download(self.done, self.write)
            except ChangedError:
                self.truncate()
                if last:
                    raise
                continue
            found = self.sha256()
            if found == self.digest:
                return
            self.truncate()
            if last:
                raise WrongDigestError(found)

    def sha256(self) -> str:
        """Of what is there."""
        return self._hash.hexdigest()

    def truncate(self) -> None:
        """Start over."""
        os.ftruncate(self.fd, 0)
        self.done = 0
        self._hash = hashlib.sha256()

    def discard(self) -> None:
        """Remove the file."""
        with suppress(FileNotFoundError):
            self.path.unlink()

    def release(self) -> None:
        """Let go of the lock, keeping the descriptor open."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go; what was downloaded stays for the next one."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def _load(self) -> None:
        """Hash what an earlier download left; too much of it is worth nothing."""
        found = os.fstat(self.fd).st_size
        if found > self.size:
            self.truncate()
            return
        while self.done < found:
            block = os.pread(self.fd, _BLOCK, self.done)
            if not block:
                break
            self._hash.update(block)
            self.done += len(block)


class _Usage:
    """The byte count in `usage`; only used under `lock`."""

    def __init__(self, root: Path) -> None:
        self._path = root / "usage"

    def read(self) -> int:
        try:
            return int(self._path.read_text())
        except (FileNotFoundError, ValueError):
            # Unknown: more than any limit, so that the next eviction counts.
            return 1 << 62

    def write(self, used: int) -> None:
        self._path.write_text(str(used))


def _hash(fd: int) -> str:
    """The sha256 of a whole file; does not move its position."""
    digest = hashlib.sha256()
    at = 0
    while block := os.pread(fd, _BLOCK, at):
        digest.update(block)
        at += len(block)
    return digest.hexdigest()


def _lock_now(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
