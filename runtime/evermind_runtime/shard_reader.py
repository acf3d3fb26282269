"""Reads shards from a package's store into slots, and lets only verified ones through.

Three ways to read, chosen by size and place: through the store, which serves any package;
several neighbours with one `preadv`; or directly (`O_DIRECT`), past the page cache, straight
from the disk into the slot. Thread-safe.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias, get_args

from evermind_manifests.descriptor import Descriptor
from evermind_manifests.errors import (
    ClosedError,
    InputError,
    IntegrityError,
    ShardDigestError,
    TruncatedError,
)
from evermind_manifests.manifest import Shard
from evermind_manifests.package import Package, check_digest, shard_place
from evermind_manifests.shard import check_shard, read_header

from .devices import Slot
from .layers import BLOCK, DIRECT_BYTES, slot_bytes
from .memory import available_bytes
from .policies import ExpertKey
from .read_plan import plan_reads

Verify: TypeAlias = Literal["first", "always", "never"]
IoMode: TypeAlias = Literal["auto", "direct", "buffered"]
Proceed: TypeAlias = Callable[[], bool]

# A guess is read in pieces, so that it can be given up between two of them; and what is
# hashed, so that the disk is not idle meanwhile. At 1 MiB the disk is as fast as with whole
# experts (1.1 GB/s).
_PIECE = 1 << 20
# Of the experts, what the page cache must be able to hold beside the budget for buffered
# reads to be the faster: with a share f in it they take f/4.2 + (1-f)/0.75 ns a byte (warm and
# cold buffered reads), direct ones 1/1.1.
_CACHED_SHARE = 0.4
_MOST_OPEN_FILES = 64
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
# What file systems say that have no direct reads, and stores that have no such file.
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_GAP = memoryview(bytearray(BLOCK))


class ReadAbandonedError(Exception):
    """A guess was given up before it had been read; never leaves the pager."""


class ShardReader:
    """Fills slots with experts. `mode` is what is used now, `note` why, where `auto` chose."""

    def __init__(self, package: Package, *, io: IoMode, verify: Verify, budget: int) -> None:
        """Raises `InputError` for an unknown option, or for direct reads that cannot be had."""
        if verify not in get_args(Verify):
            raise InputError(f"verify: expected one of {get_args(Verify)}, found {verify!r}")
        if io not in get_args(IoMode):
            raise InputError(f"io: expected one of {get_args(IoMode)}, found {io!r}")
        self._package = package
        self._verify = verify
        self._verified: set[ExpertKey] = set()
        self._forced = io == "direct"
        self._files = _Extents(package)
        shards = package.manifest.shards
        self._neighbours = self._files.supported and len({s.file for s in shards}) < len(shards)
        self.mode: Literal["direct", "buffered"] = "buffered"
        self.note = "asked for"
        # Whether a read that would block can be refused instead; a file system may say no.
        self._nowait = self._files.supported and hasattr(os, "RWF_NOWAIT")
        if io != "buffered":
            self.note = self._why_buffered(budget) or ""
            if not self.note:
                self.mode, self._nowait = "direct", False
            elif self._forced:
                raise InputError(
                    f"io: direct reads of {package.location} cannot be had: {self.note}",
                    hint="Use io='auto' or io='buffered'.",
                )

    def fill(
        self,
        keys: Sequence[ExpertKey],
        slots: Sequence[Slot],
        read: list[int],
        proceed: Proceed | None = None,
        waits: Callable[[int], None] | None = None,
    ) -> None:
        """Fill `slots` with these experts.

        `read` tells, for each, how many bytes have been read. `proceed` is asked between the
        pieces of a long read: once it says no, `ReadAbandonedError` is raised. `waits` is
        called before what takes long: a digest, or a read that the page cache cannot serve. It is
        told which of the experts that is, and may take those that follow off the lists.
        Otherwise raises `ShardDigestError` or `ShardError` where a shard is not what the
        manifest says, or what the store raises.
        """
        together = self._neighbours and self.mode == "buffered"
        if waits is None and len(keys) > 1 and together:
            self._fill_together([self._package.shard(*key) for key in keys], slots, read)
            return
        # As many as `waits` leaves there.
        for at, slot in enumerate(slots):
            key = keys[at]
            shard = self._package.shard(*key)
            unknown = self._checks(key)
            with slot.filling() as room:
                done = 0
                if self._nowait and not unknown and proceed is None:
                    done = self._read_once(shard, room, 0 if waits is None else os.RWF_NOWAIT)
                if done == shard.bytes:
                    read[at] = done
                    continue
                if waits is not None:
                    waits(at)
                seen = hashlib.sha256() if unknown else None
                self._read(shard, room, read, at, proceed, done, seen)
                if seen is not None:
                    self._check(shard, room, read, at, seen)

    def close(self) -> None:
        """Close what was opened; reads that run end as if it were open."""
        self._files.close()

    def _why_buffered(self, budget: int) -> str | None:
        """Why experts are not read directly; `None` if they are."""
        manifest = self._package.manifest
        size = slot_bytes(manifest)
        if not self._files.supported:
            return "this store does not read from a local file"
        if not size:
            return "there are no experts"
        if size < DIRECT_BYTES:
            return f"experts of {size:,} bytes are too small for it to pay"
        unaligned = next((s for s in manifest.shards if s.offset % BLOCK), None)
        if unaligned is not None:
            return f"{shard_place(unaligned)} does not begin at a multiple of {BLOCK}"
        if not self._forced:
            total = sum(shard.bytes for shard in manifest.shards)
            room = available_bytes()
            if room is None or room - budget >= _CACHED_SHARE * total:
                return "the page cache has room for the experts"
        try:
            with self._files.use(manifest.shards[0].file, _O_DIRECT) as (_, begin, _):
                return _misplaced(manifest.shards[0].file, begin)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return f"direct reads are refused: {error.strerror}"

    def _read(
        self,
        shard: Shard,
        room: memoryview,
        read: list[int],
        at: int,
        proceed: Proceed | None = None,
        cached: int = 0,
        seen: hashlib._Hash | None = None,
    ) -> None:
        """Read one shard but for what is there, counting what came in `read[at]`.

        `seen` hashes it piece by piece: while one reader hashes, another one has the disk.
        """
        if proceed is None and seen is None and self.mode == "buffered":
            if cached < shard.bytes:
                rest = room[cached : shard.bytes]
                self._package.store.read_into(shard.file, shard.offset + cached, rest)
            read[at] += shard.bytes
            return
        direct = self.mode == "direct"
        # Of a store that is no file of this machine, each piece may be a request.
        hashing = seen is not None and self._files.supported
        step = _PIECE if proceed is not None or hashing else shard.bytes
        for begin in range(0, shard.bytes, step):
            if proceed is not None and not proceed():
                raise ReadAbandonedError
            end = min(begin + step, shard.bytes)
            if not (direct and self._read_direct(shard, room, begin, end)):
                direct = False
                self._package.store.read_into(shard.file, shard.offset + begin, room[begin:end])
            if seen is not None:
                seen.update(room[begin:end])
            read[at] += end - begin

    def _read_once(self, shard: Shard, room: memoryview, flags: int) -> int:
        """How many of its bytes one read gives, from the first on."""
        try:
            file, fd, begin, length = self._files.acquire(shard.file, 0)
            try:
                _check_length(shard, length)
                return os.preadv(fd, [room[: shard.bytes]], begin + shard.offset, flags)
            finally:
                file.release()
        except BlockingIOError:
            return 0
        except IntegrityError:
            raise
        except OSError as error:
            if error.errno not in _REFUSED:
                raise IntegrityError(f"{shard.file}: {error.strerror}") from error
        self._nowait = False
        return 0

    def _read_direct(self, shard: Shard, room: memoryview, begin: int, end: int) -> bool:
        """Whether it could be read so; if not, `mode` is buffered from now on."""
        try:
            with self._files.use(shard.file, _O_DIRECT) as (fd, start, length):
                note = _misplaced(shard.file, start)
                if note is None:
                    _check_length(shard, length)
                    _preadv_direct(fd, start + shard.offset, shard, room, begin, end)
                    return True
        except IntegrityError:
            raise
        except OSError as error:
            if error.errno not in _REFUSED:
                raise IntegrityError(f"{shard.file}: {error.strerror}") from error
            note = f"{shard.file}: direct reads are refused: {error.strerror}"
        if self._forced:
            raise InputError(f"io: direct reads cannot be had: {note}")
        self.mode, self.note = "buffered", note
        return False

    def _fill_together(
        self, shards: Sequence[Shard], slots: Sequence[Slot], read: list[int]
    ) -> None:
        """Read neighbours at once."""
        for group in plan_reads(shards):
            with ExitStack() as stack:
                rooms = [stack.enter_context(slots[at].filling()) for at in group]
                if len(group) == 1 or not self._read_together([shards[at] for at in group], rooms):
                    for at, room in zip(group, rooms, strict=True):
                        self._read(shards[at], room, read, at)
                else:
                    for at in group:
                        read[at] = shards[at].bytes
                for at, room in zip(group, rooms, strict=True):
                    self._check(shards[at], room, read, at)

    def _read_together(self, shards: Sequence[Shard], rooms: Sequence[memoryview]) -> bool:
        """Whether the store has the file they lie in; if not, it is not asked again."""
        views: list[memoryview] = []
        end = shards[0].offset
        for shard, room in zip(shards, rooms, strict=True):
            if shard.offset > end:
                # Every reader writes what lies between shards here, and nobody reads it.
                views.append(_GAP[: shard.offset - end])
            views.append(room[: shard.bytes])
            end = shard.offset + shard.bytes
        try:
            with self._files.use(shards[0].file, 0) as (fd, begin, length):
                _check_length(shards[-1], length)
                _preadv_all(fd, begin + shards[0].offset, views, shards[-1])
        except IntegrityError:
            raise
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._neighbours = False
        return self._neighbours

    def _checks(self, key: ExpertKey) -> bool:
        """Whether what is read of this expert is held against its digest."""
        return self._verify == "always" or (self._verify == "first" and key not in self._verified)

    def _check(
        self,
        shard: Shard,
        room: memoryview,
        read: list[int],
        at: int,
        seen: hashlib._Hash | None = None,
    ) -> None:
        """Check what was read against its digest; `seen` has hashed it, if anything has."""
        key = shard.layer, shard.expert
        if not self._checks(key):
            return
        data = room[: shard.bytes]
        where, field = shard_place(shard), f"shard of layer {key[0]}, expert {key[1]}"
        if (seen or hashlib.sha256(data)).hexdigest() != shard.sha256:
            # A transfer may have gone wrong; damage at rest comes back the same.
            self._read(shard, room, read, at)
            location = self._package.location
            check_digest(data, shard.sha256, where, field, ShardDigestError, location)
        name, kind = self._package.kind_of(key[0])
        check_shard(read_header(data, shard.bytes, where), kind, shard, where, kind_name=name)
        self._verified.add(key)


class _Extents:
    """Where files of the package lie in files of this machine: open descriptors, a few at most.

    `_lock` guards the cache; a descriptor in use is closed by its last user only.
    """

    def __init__(self, package: Package) -> None:
        self._open: Any = getattr(package.store, "open_extent", None)
        self._location = package.location
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[str, int], tuple[Descriptor, int, int]] = OrderedDict()
        self._closed = False

    @property
    def supported(self) -> bool:
        return self._open is not None

    @contextmanager
    def use(self, path: str, flags: int) -> Iterator[tuple[int, int, int]]:
        """(descriptor, offset, length) of the file, opened with these flags."""
        file, *where = self.acquire(path, flags)
        try:
            yield where[0], where[1], where[2]
        finally:
            file.release()

    def acquire(self, path: str, flags: int) -> tuple[Descriptor, int, int, int]:
        """The same, in use until the first is released."""
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._location}: the package is closed")
            entry = self._files.get((path, flags))
            if entry is None:
                fd, begin, length = self._open(path, flags)
                entry = self._files[path, flags] = Descriptor(fd, path), begin, length
                if len(self._files) > _MOST_OPEN_FILES:
                    self._files.popitem(last=False)[1][0].close()
            else:
                self._files.move_to_end((path, flags))
            file, begin, length = entry
            return file, file.acquire(), begin, length

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for descriptor, _, _ in self._files.values():
                descriptor.close()
            self._files.clear()


def _misplaced(file: str, begin: int) -> str | None:
    """Why a file that begins at `begin` of another cannot be read directly, if so."""
    return f"{file} does not begin at a multiple of {BLOCK}" if begin % BLOCK else None


def _check_length(shard: Shard, length: int) -> None:
    if shard.offset + shard.bytes > length:
        raise _truncated(shard, max(0, length - shard.offset))


def _truncated(shard: Shard, found: int) -> TruncatedError:
    return TruncatedError(
        f"{shard.file}: expected {shard.bytes} bytes from {shard.offset}, found {found}",
        hint="The file is shorter than the manifest says: fetch or copy it again.",
    )


def _preadv_direct(
    fd: int, start: int, shard: Shard, room: memoryview, begin: int, end: int
) -> None:
    """Fill `room[begin:end]`, in whole blocks, with what lies from `start + begin` on."""
    done, upto = begin, -(-end // BLOCK) * BLOCK
    while done < end:
        count = os.preadv(fd, [room[done:upto]], start + done)
        done += count
        # Only the end of the file is no whole block.
        if count == 0 or (count % BLOCK and done < end):
            raise _truncated(shard, done)


def _preadv_all(fd: int, begin: int, views: Sequence[memoryview], last: Shard) -> None:
    """Fill all `views`, one after the other, from `begin`."""
    rest = list(views)
    while rest:
        try:
            count = os.preadv(fd, rest, begin)
        except OSError as error:
            raise IntegrityError(f"{last.file}: {error.strerror} at byte {begin}") from error
        if count == 0:
            raise _truncated(last, 0)
        begin += count
        while rest and count >= len(rest[0]):
            count -= len(rest[0])
            del rest[0]
        if rest:
            rest[0] = rest[0][count:]
