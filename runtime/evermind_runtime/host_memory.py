"""Host memory for weights, in large pages where the system has them.

A token reads a few hundred kilobytes here and there: with pages of 4 KiB each expert costs a
hundred walks of the page table, and the processor's prefetching ends at every page. Pages of
2 MiB made decoding of small experts up to 1.12 times as fast (BENCHMARKS.md).
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from .layers import BLOCK

_LARGE_PAGE = 1 << 21
# What is asked of the system at once: a process may be limited in the addresses it uses.
_REGION = 64 << 20
_CACHE_LINE = 64


class HostMemory:
    """Hands out `total` bytes, page-aligned or by cache lines; freed when nothing refers to it.

    Memory is taken from the system region by region, and used page by page: what is never
    written costs addresses only. Not thread-safe.
    """

    def __init__(self, total: int) -> None:
        self._left = total
        self._region = np.empty(0, dtype=np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes: whole pages of their own, from their first byte, if `size` is whole
        pages; else they begin at a cache line.

        More than `total` in all is given too, from regions of its own.
        """
        align = BLOCK if size % BLOCK == 0 else _CACHE_LINE
        begin = -self._region.ctypes.data % align
        if begin + size > len(self._region):
            self._region = _region(max(size, min(_REGION // max(size, 1) * size, self._left)))
            begin = 0
        self._left = max(0, self._left - size)
        taken = self._region[begin : begin + size]
        self._region = self._region[begin + size :]
        return taken


def _region(size: int) -> npt.NDArray[np.uint8]:
    """At least `size` bytes from the start of a large page on."""
    # The block after them is never touched, so it takes no memory: kernels that load whole
    # vectors may look a little past the last tensor, and would fault without it.
    pages = _private_pages(size + _LARGE_PAGE + BLOCK)
    whole = np.frombuffer(pages, dtype=np.uint8)
    begin = -whole.ctypes.data % _LARGE_PAGE
    # Only those that are filled: the last bytes must not cost a large page.
    filled = size // _LARGE_PAGE * _LARGE_PAGE
    if filled and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them: it is the same memory
            pages.madvise(mmap.MADV_HUGEPAGE, begin, filled)
    return whole[begin : begin + size]


def _private_pages(size: int) -> mmap.mmap:
    """Anonymous memory that a forked process gets its own copy of."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
