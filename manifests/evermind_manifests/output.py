"""A file being written: hashed on other threads, large blocks past the page cache.

A copy into the page cache costs as much of a core as hashing does, and the disk waits until
the system finds that it is time to write. What the disk takes directly (`O_DIRECT`) costs
neither; where it cannot, the same blocks go through the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from concurrent.futures import Executor
from io import FileIO
from mmap import mmap
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from .manifest import FileEntry, Shard
from .shard import Buffer
from .staging import start_writeback

if TYPE_CHECKING:
    from hashlib import _Hash

Block: TypeAlias = npt.NDArray[np.uint8]

_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
_BLOCK_BYTES: Final = 4 << 20
# A disk takes less than this at a time no sooner than the page cache does.
_DIRECT_BYTES: Final = 1 << 20
# Of offsets, lengths and memory; no disk asks for more.
_DIRECT_ALIGNMENT: Final = 4096
_WRITEBACK_BYTES: Final = 1 << 20
# What is smaller is hashed sooner than it is handed to a thread.
_HANDED_BYTES: Final = 1 << 18


class Output:
    """One file of a package, open for writing; `position` is where its next byte goes.

    Of what was written the system does not have the last `held` bytes until they are flushed.
    `spare` are blocks that no file uses now: one is taken from there, and given back by `close`.
    All methods raise `OSError`.
    """

    def __init__(self, path: str, file: FileIO, hashers: Executor, spare: list[Block]) -> None:
        self.path = path
        self.position = 0
        self._digest = hashlib.sha256()
        self._file = file
        self._hashers = hashers
        self._spare = spare
        # Mapped, for it is to begin with a page.
        self._block = spare.pop() if spare else np.frombuffer(mmap(-1, _BLOCK_BYTES), np.uint8)
        self.held = 0  # at the block's begin
        self._can_direct = bool(_O_DIRECT)
        self._cached = 0  # bytes that the disk was not told to begin on

    @property
    def entry(self) -> FileEntry:
        """What a manifest says of the file."""
        return FileEntry(bytes=self.position, sha256=self._digest.hexdigest())

    def write(self, data: Buffer, alone: _Hash | None = None) -> None:
        """Add bytes, which the digest `alone` of a part takes in too."""
        view = np.frombuffer(data, np.uint8)
        digests = [self._digest] if alone is None else [self._digest, alone]
        hashing = []
        if len(view) < _HANDED_BYTES:
            for digest in digests:
                digest.update(view.data)
        else:
            hashing = [self._hashers.submit(digest.update, view.data) for digest in digests]
        taken = 0
        while taken < len(view):
            size = min(len(view) - taken, _BLOCK_BYTES - self.held)
            # numpy copies without the interpreter's lock, which the thread that rounds needs.
            self._block[self.held : self.held + size] = view[taken : taken + size]
            taken += size
            self.held += size
            self.position += size
            if self.held == _BLOCK_BYTES:
                self.flush()
        for hashed in hashing:
            hashed.result()

    def flush(self) -> None:
        """Hand all that was written to the system, so that a full disk shows here."""
        begin, done = self.position - self.held, 0
        while done < self.held:
            done += self._put(self._block[done : self.held].data, begin + done)
        self.held = 0

    def close(self) -> None:
        """Let go of the file; what was not flushed is lost."""
        self._spare.append(self._block)
        self._file.close()

    def take(self, shard: Shard) -> bool:
        """Pass over a shard that is in the file already; False if it is not the one described."""
        self.flush()
        both, alone = self._digest.copy(), hashlib.sha256()
        position, end = self.position, self.position + shard.bytes
        while position < end and (
            data := os.pread(self._file.fileno(), min(end - position, _BLOCK_BYTES), position)
        ):
            both.update(data)
            alone.update(data)
            position += len(data)
        if position < end or alone.hexdigest() != shard.sha256:
            return False
        self._digest = both
        self.position = end
        return True

    def cut(self) -> None:
        """Drop what another writer put after `position`."""
        os.ftruncate(self._file.fileno(), self.position)

    def _put(self, data: memoryview, offset: int) -> int:
        """Write some of `data` there; how much."""
        aligned = not (offset | len(data)) % _DIRECT_ALIGNMENT
        if self._can_direct and aligned and len(data) >= _DIRECT_BYTES:
            try:
                fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, _O_DIRECT)
                return os.pwrite(self._file.fileno(), data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._can_direct = False  # this file system does not
        fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, 0)
        written = os.pwrite(self._file.fileno(), data, offset)
        self._cached += written
        if self._cached >= _WRITEBACK_BYTES:
            start_writeback(self._file.fileno())
            self._cached = 0
        return written
