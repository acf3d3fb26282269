"""A limit on the memory that experts take in this process, page cache included.

By default a governor enforces it: a thread that every 10 ms takes back what goes beyond. For
a run that maps its files it counts the pages in memory (mincore) and drops the experts used
longest ago, whole, from the mapping and from the page cache: a kinder choice than the
kernel's own. For a run that reads them into memory of its own, which the budget bounds, the
page cache is allowed nothing: every page of the files is dropped. What the process needs
apart from experts counts in neither case.

Where EVERMIND_BENCH_CGROUP names an empty memory cgroup (version 1 or 2) that this user may
write to, the process joins it instead and the kernel enforces the limit, plus `BESIDES` for
the rest of the process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .common import MIB

CADENCE = 0.010
BESIDES = 160 * MIB
CGROUP_VARIABLE = "EVERMIND_BENCH_CGROUP"

_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def enforced(limit: int, take_back: Callable[[], int]) -> Iterator[Callable[[], tuple[str, int]]]:
    """Within, the limit holds; the result says by whom, and the most bytes that were counted.

    `take_back` drops what is beyond the limit and returns how much it counted before.
    """
    if cgroup := os.environ.get(CGROUP_VARIABLE):
        join_cgroup(Path(cgroup), limit + BESIDES)
        yield lambda: ("cgroup", 0)
        return
    stop, most = threading.Event(), 0

    def govern() -> None:
        nonlocal most
        while not stop.wait(CADENCE):
            most = max(most, take_back())

    thread = threading.Thread(target=govern, daemon=True)
    thread.start()
    try:
        yield lambda: ("governor", most)
    finally:
        stop.set()
        thread.join()


def join_cgroup(folder: Path, limit: int) -> None:
    """Bound a cgroup's memory and move this process into it. Raises `OSError` if it may not."""
    names = ("memory.max", "memory.limit_in_bytes")
    control = next((folder / name for name in names if (folder / name).exists()), None)
    if control is None:
        raise OSError(f"{CGROUP_VARIABLE}: {folder} is no memory cgroup: it has none of {names}")
    control.write_text(str(limit))
    (folder / "cgroup.procs").write_text(str(os.getpid()))


class ReadFiles:
    """Files that are read and not mapped: nothing of them may stay in the page cache."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._fds = [os.open(path, os.O_RDONLY) for path in paths]

    def take_back(self) -> int:
        """Drop every page. What there was is not counted: 0."""
        for fd in self._fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return 0


class MappedFiles:
    """Files mapped whole, one for every key; those used longest ago are the first to go."""

    def __init__(self, paths: dict[Hashable, Path], limit: int) -> None:
        self._limit = limit
        self._maps: dict[Hashable, tuple[int, np.ndarray]] = {}
        for key, path in paths.items():
            fd = os.open(path, os.O_RDONLY)
            mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            self._maps[key] = (fd, np.frombuffer(mapped, np.uint8))
        # Guarded by `_lock`: what may be in memory, in the order of its last use.
        self._used: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()

    def use(self, key: Hashable) -> np.ndarray:
        """The file's bytes; touching them reads what is not in memory."""
        with self._lock:
            self._used[key] = None
            self._used.move_to_end(key)
        return self._maps[key][1]

    def take_back(self) -> int:
        """Drop what is beyond the limit; returns the bytes in memory before."""
        with self._lock:
            used = list(self._used)
        held = {key: self._resident(key) for key in used}
        found = total = sum(held.values())
        for key in used:
            if total <= self._limit:
                break
            fd, view = self._maps[key]
            with self._lock:
                self._used.pop(key, None)
            # The mapping first: pages that somebody has mapped stay in the page cache.
            _LIBC.madvise(_address(view), ctypes.c_size_t(view.nbytes), mmap.MADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            total -= held[key]
        return found

    def _resident(self, key: Hashable) -> int:
        _, view = self._maps[key]
        pages = np.zeros(-(-view.nbytes // mmap.PAGESIZE), np.uint8)
        size = ctypes.c_size_t(view.nbytes)
        assert _LIBC.mincore(_address(view), size, _address(pages)) == 0
        return int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE


class MappedWeights:
    """A file that a library of this process has mapped, of which `parts` may be dropped.

    What is counted is what the process has mapped of files (RssFile) beyond the `other` bytes it
    had before the library opened this one, so that a reading is cheap. Parts go whole, those
    first that `use` was told of longest ago; what is no part (all that every token needs) stays.
    A kernel is less kind. Raises `OSError` if the file is not mapped.
    """

    def __init__(
        self,
        path: str,
        parts: Mapping[Hashable, Sequence[tuple[int, int]]],
        limit: int,
        other: int,
    ) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._base = _mapped_at(os.path.realpath(path))
        self._limit = limit
        self._other = other
        # Guarded by `_lock`: parts in the order of their last use, those in memory, and where.
        self._lock = threading.Lock()
        self._parts = OrderedDict(parts)
        self._dropped: set[Hashable] = set()

    def use(self, keys: Sequence[Hashable]) -> None:
        """These are in use now."""
        with self._lock:
            for key in keys:
                self._parts.move_to_end(key)
                self._dropped.discard(key)

    def take_back(self) -> int:
        """Drop what is beyond the limit; returns the bytes in memory before."""
        found = held = mapped_bytes() - self._other
        with self._lock:
            candidates = [key for key in self._parts if key not in self._dropped]
        for key in candidates:
            if held <= self._limit:
                break
            self._drop(key)
            held = mapped_bytes() - self._other
        if held > self._limit:
            # What is used was told too late, or read ahead beside its neighbours.
            with self._lock:
                self._dropped.clear()
        return found

    def _drop(self, key: Hashable) -> None:
        with self._lock:
            self._dropped.add(key)
        for offset, size in self._parts[key]:
            begin = offset - offset % mmap.PAGESIZE
            length = offset + size - begin
            # The mapping first: pages that somebody has mapped stay in the page cache.
            address = ctypes.c_void_p(self._base + begin)
            _LIBC.madvise(address, ctypes.c_size_t(length), mmap.MADV_DONTNEED)
            os.posix_fadvise(self._fd, begin, length, os.POSIX_FADV_DONTNEED)


def mapped_bytes() -> int:
    """What this process has in memory of the files it has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


def _mapped_at(path: str) -> int:
    """The address of the file's first byte, were all of it mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(path):
            words = line.split()
            return int(words[0].partition("-")[0], 16) - int(words[2], 16)
    raise OSError(f"{path} is not mapped")


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
