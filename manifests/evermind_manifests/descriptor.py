"""A file descriptor that many threads read: closed when the last of them is done."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ClosedError


class Descriptor:
    """Owns one open descriptor of the file or folder `location`. Thread-safe.

    A number that is closed under its reader may at once belong to another file, whose bytes
    the reader would get: so closing waits for the users there are, and lets in no new one.
    """

    def __init__(self, fd: int, location: str) -> None:
        self._fd = fd
        self._location = location
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    def acquire(self) -> int:
        """The descriptor's number, valid until `release`. Raises `ClosedError`."""
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._location}: the package is closed")
            self._users += 1
            return self._fd

    def release(self) -> None:
        """End one use that `acquire` began."""
        with self._lock:
            self._users -= 1
            self._close_if_done()

    @contextmanager
    def use(self) -> Iterator[int]:
        """The descriptor's number inside a `with`. Raises `ClosedError`."""
        fd = self.acquire()
        try:
            yield fd
        finally:
            self.release()

    def close(self) -> None:
        """Close the descriptor, now or with its last user; again does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._close_if_done()

    def _close_if_done(self) -> None:
        if self._closed and not self._users:
            os.close(self._fd)
