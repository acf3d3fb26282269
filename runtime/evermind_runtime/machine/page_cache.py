"""The kernel's page cache: whether a file's bytes are in it, and having them leave it."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import Any

import numpy as np

_PAGE = mmap.PAGESIZE


def drop(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to forget these bytes of a file; pages somebody has mapped stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    # Pages that have yet to be written cannot leave. A read-only descriptor may sync too.
    os.fsync(fd)
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def cached_bytes(fd: int, offset: int, length: int) -> int | None:
    """How many of these bytes are in memory, by whole pages; `None` where it cannot be told.

    To a process that may not write the file the kernel answers that all of it is.
    """
    mincore = _mincore()
    if mincore is None or length == 0:
        return None if length else 0
    begin = offset - offset % _PAGE
    span = offset + length - begin
    try:
        mapped = mmap.mmap(fd, span, prot=mmap.PROT_READ, offset=begin)
    except (OSError, ValueError):
        return None
    with mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-span // _PAGE), np.uint8)
        failed = mincore(view.ctypes.data, span, pages.ctypes.data)
        del view  # or the mapping could not be closed
        return None if failed else int(np.count_nonzero(pages & 1)) * _PAGE


@functools.cache
def _mincore() -> Any:
    try:
        function = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function
