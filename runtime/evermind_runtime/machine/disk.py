"""How fast files can be read here, in reads as large as one expert.

The size matters: a disk that gives 4 GB/s in blocks of 8 MiB may give 0.03 GB/s in blocks of
4 KiB. So the package's own shards are read where there are some, else a temporary file.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from evermind_manifests.errors import EvermindPackError
from evermind_manifests.package import Package

from . import page_cache

DiskHow: TypeAlias = Literal["direct", "uncached", "cached", "warm", "given"]

#: What a figure of each kind was read from.
DISK_HOW: Final[dict[DiskHow, str]] = {
    "direct": "from the disk itself (O_DIRECT)",
    "uncached": "after the pages had left the page cache",
    "cached": "from the page cache: this place has no direct reads and its pages cannot be "
    "dropped, so the disk's own rate is not known",
    "warm": "from the page cache, which holds the package",
    "given": "as given, not measured",
}
_ALIGNMENT = 4096
_LEAST_BLOCK = 4096
_MOST_BLOCK = 8 * 2**20
_READERS = (1, 4)
_MOST_BYTES = 256 * 2**20
_TEMPORARY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file that one read fetches; `open` takes flags and gives a descriptor."""

    open: Callable[[int], int]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Bytes per second of reads of `block` bytes, `readers` at a time.

    `rate` is what a miss costs, read as `how` says; `cached_rate` is what it costs while the
    page cache holds it.
    """

    rate: float
    how: DiskHow
    cached_rate: float
    block: int
    readers: int


def measure_disk(extents: Sequence[Extent], *, seconds: float = 1.0) -> DiskRates:
    """Read these places, in order and over again, for about that long in all.

    The rate is the best of one reader and several. Raises `OSError` if they cannot be read.
    """
    block = _block(extents)
    share = seconds / (len(_READERS) + 1)
    how, flags = _way(extents)
    best, readers = 0.0, 1
    for count in _READERS:
        if how == "uncached":
            drop_pages(extents)
        rate = _timed(extents, block, flags, count, share, once=how == "uncached")
        if rate > best:
            best, readers = rate, count
    _timed(extents, block, 0, 1, share, once=True)  # into the page cache
    cached = max(_timed(extents, block, 0, count, share / 2) for count in _READERS)
    return DiskRates(cached if how == "cached" else best, how, cached, block, readers)


def shard_extents(package: Package) -> list[Extent]:
    """The package's shards, in the order they lie, as many as are worth measuring.

    Empty where it has none, or where they lie in no local file.
    """
    manifest = package.manifest
    shards = [(shard.file, shard.offset, shard.bytes) for shard in manifest.shards]
    return _extents(
        package, shards[: max(1, _MOST_BYTES // max(1, shards[0][2]))] if shards else []
    )


def file_extents(package: Package) -> list[Extent]:
    """Every file of a package whole, or nothing where they are no local files."""
    files = package.manifest.files
    return _extents(package, [(path, 0, entry.bytes) for path, entry in files.items()])


def _extents(package: Package, places: Sequence[tuple[str, int, int]]) -> list[Extent]:
    open_extent = getattr(package.store, "open_extent", None)
    extents = []
    for path, offset, size in places:
        if open_extent is None:
            return _parts(package.location, size)
        try:
            fd, begin, _ = open_extent(path)
        except (EvermindPackError, OSError):
            return []
        os.close(fd)
        extents.append(Extent(functools.partial(_first, open_extent, path), begin + offset, size))
    return extents


def _first(open_extent: Callable[[str, int], tuple[int, int, int]], path: str, flags: int) -> int:
    return open_extent(path, flags)[0]


def _parts(path: str, size: int) -> list[Extent]:
    """A regular file in parts of that size: a peer's file, whose experts lie packed in it."""
    if not os.path.isfile(path) or size == 0:  # noqa: PTH113
        return []
    total = os.path.getsize(path)  # noqa: PTH202
    opener = functools.partial(_open, path)
    return [Extent(opener, at, min(size, total - at)) for at in range(0, total, size)]


def _open(path: str, flags: int) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)


@contextlib.contextmanager
def temporary_extents(folder: str | os.PathLike[str], block: int) -> Iterator[list[Extent]]:
    """A file of 64 MiB in `folder`, in parts of `block` bytes; it is gone afterwards.

    Raises `OSError` where it cannot be written.
    """
    block = min(max(block, _LEAST_BLOCK), _MOST_BLOCK)
    block += -block % _ALIGNMENT
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".evermind-pack-") as file:
        piece = os.urandom(2**20)
        for _ in range(_TEMPORARY_BYTES // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        parts = range(0, _TEMPORARY_BYTES - block + 1, block)
        opener = functools.partial(_open, file.name)
        yield [Extent(opener, offset, block) for offset in parts]


def _block(extents: Sequence[Extent]) -> int:
    """The middle one of the sizes, within bounds and a multiple of a page."""
    sizes = sorted(extent.bytes for extent in extents)
    size = min(max(sizes[len(sizes) // 2], _LEAST_BLOCK), _MOST_BLOCK)
    return size + -size % _ALIGNMENT


def _way(extents: Sequence[Extent]) -> tuple[DiskHow, int]:
    """How these files can be read past the page cache, if at all, and with which open flags."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        with contextlib.suppress(OSError):
            _timed(extents[:1], _LEAST_BLOCK, direct, 1, 0, once=True)
            return "direct", direct
    return ("uncached" if drop_pages(extents) else "cached"), 0


def drop_pages(extents: Sequence[Extent]) -> bool:
    """Have these bytes leave the page cache; whether they did, as far as can be told."""
    for extent in extents:
        with _opened(extent, 0) as fd:
            page_cache.drop(fd, extent.offset, extent.bytes)
    held = total = 0
    for extent in extents:
        with _opened(extent, 0) as fd:
            cached = page_cache.cached_bytes(fd, extent.offset, extent.bytes)
        if cached is None:
            return False
        held += cached
        total += extent.bytes
    # The ends of a file's parts share pages with their neighbours.
    return held <= total // 10


def _timed(
    extents: Sequence[Extent],
    block: int,
    flags: int,
    readers: int,
    seconds: float,
    *,
    once: bool = False,
) -> float:
    """Bytes per second; stops when the time is up, or with `once` after one pass."""
    order = iter(extents) if once else itertools.cycle(extents)
    lock = threading.Lock()
    failures: list[OSError] = []
    counts = [0] * readers
    broken_off = threading.Event()
    deadline = time.perf_counter() + max(seconds, 0.01) * (4 if once else 1)

    def work(number: int) -> None:
        with mmap.mmap(-1, block) as buffer:
            while time.perf_counter() < deadline and sum(counts) < _MOST_BYTES:
                if broken_off.is_set():
                    return
                with lock:
                    extent = next(order, None)
                if extent is None:
                    return
                try:
                    counts[number] += _read(extent, buffer, flags)
                except OSError as error:
                    failures.append(error)
                    return

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(readers)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        # Ctrl-C: what they read is about to be closed.
        broken_off.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise failures[0]
    return sum(counts) / (time.perf_counter() - started)


def _read(extent: Extent, buffer: mmap.mmap, flags: int) -> int:
    """Read an extent, or as much of it as the buffer holds; its start is aligned down."""
    begin = extent.offset - extent.offset % _ALIGNMENT
    with _opened(extent, flags) as fd:
        count = os.preadv(fd, [buffer], begin)
    return min(count, extent.offset + extent.bytes - begin)


@contextlib.contextmanager
def _opened(extent: Extent, flags: int) -> Iterator[int]:
    fd = extent.open(flags)
    try:
        yield fd
    finally:
        os.close(fd)
