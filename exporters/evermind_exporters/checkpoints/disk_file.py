"""A file that is read in places: checkpoints larger than memory are never held whole."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import suppress

from evermind_manifests.descriptor import Descriptor
from evermind_manifests.location import open_regular
from evermind_manifests.store import read_exactly


class DiskFile:
    """Positioned reads from one regular file; its descriptor is closed with the last user.

    Safe to share between threads. What is read is not mapped: it does not count as this
    process's memory once it is dropped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `LocationError` where no regular file is."""
        self.location = os.fspath(path)
        fd, self.size = open_regular(path)
        self._file = Descriptor(fd, self.location)
        self._finalizer = weakref.finalize(self, self._file.close)

    def read(self, offset: int, length: int) -> memoryview:
        """`length` bytes from `offset` on; raises `TruncatedError` where there are fewer."""
        buffer = memoryview(bytearray(length))
        with self._file.use() as fd:
            read_exactly(fd, offset, buffer, self.location)
        return buffer

    def check_open(self) -> None:
        """Raise `ClosedError` once the file is closed."""
        with self._file.use():
            return

    def close(self) -> None:
        """Close the file; it cannot be read afterwards."""
        self._finalizer()

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, in order, with the bytes from `offset` on; raises like `read`."""
        with self._file.use() as fd:
            with suppress(OSError):
                if os.preadv(fd, buffers, offset) == sum(buffer.nbytes for buffer in buffers):
                    return
            # Short or failed: one by one, with an error that says where.
            for buffer in buffers:
                read_exactly(fd, offset, buffer, self.location)
                offset += buffer.nbytes
