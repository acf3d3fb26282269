"""What all stores across a network share: failures are retried, broken bodies resumed.

A subclass opens bodies; `stream` here turns them into exactly the bytes asked for, in
order, or an error. Time is bounded: each wait by the timeout, each attempt by a least rate,
and failures by their number, where only attempts without new bytes count.
"""

from __future__ import annotations

import random
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, TypeVar

from evermind_manifests.errors import (
    ChangedError,
    ClosedError,
    EvermindPackError,
    IntegrityError,
    NetworkError,
    TruncatedError,
)
from evermind_manifests.paths import check_path
from evermind_manifests.store import Store

from .options import RemoteOptions

Sink: TypeAlias = Callable[[bytes | memoryview], None]
_Result = TypeVar("_Result")

# An attempt that brought this much was no failure, however it ended.
_PROGRESS_BYTES: Final = 64 * 1024
# Slower than this is not slow but stuck, or meant to keep us waiting.
_LEAST_RATE: Final = 4 * 1024
_LONGEST_PAUSE = 10.0


class TransientError(Exception):
    """Something that another attempt may cure; `pause` is what the server asks to wait (s).

    `final` is what is raised once all attempts are spent, by default a `NetworkError`.
    """

    def __init__(
        self,
        reason: str,
        *,
        pause: float = 0.0,
        final: type[EvermindPackError] = NetworkError,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause = pause
        self.final = final


class Body(Protocol):
    """An answer being received: bytes of a file from `offset` on, in order.

    `total` is the file's length and `tag` names its content, where the server says.
    """

    offset: int
    total: int | None
    tag: str | None

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes as they come; may end early. Raises `TransientError`."""
        ...

    def close(self) -> None:
        """Let go of the connection; to be kept for the next request if the body is read."""
        ...


@dataclass(slots=True)
class RemoteCounters:
    """What went over the network: requests sent, body bytes received, attempts repeated."""

    requests: int = 0
    bytes_received: int = 0
    retries: int = 0


class StreamStore(Store):
    """A store whose files come as streams of bytes. Thread-safe."""

    local = False
    options: RemoteOptions
    counters: RemoteCounters

    @abstractmethod
    def stream(
        self,
        path: str,
        offset: int,
        length: int | None,
        sink: Sink,
        *,
        total: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Give `sink` the bytes from `offset` on, in order: `length` of them, or all.

        `total` is the file's length as the manifest has it, `limit` the most it may be.
        Raises `IntegrityError` for another length (both are named), `ChangedError` if the
        file is replaced on the way, `TruncatedError` if it is too short, `MissingFileError`,
        or `NetworkError` once all attempts are spent. What the sink got before stays valid
        unless the error is a `ChangedError`.
        """

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`. Raises also `NetworkError` and `ChangedError`."""
        view = buffer.cast("B")

        def read() -> None:
            done = 0

            def sink(chunk: bytes | memoryview) -> None:
                nonlocal done
                view[done : done + len(chunk)] = chunk
                done += len(chunk)

            self.stream(path, offset, len(view), sink)

        once_more(read)

    def read(self, path: str, *, limit: int) -> bytes:
        """See `Store.read`."""

        def read() -> bytes:
            data = bytearray()

            def sink(chunk: bytes | memoryview) -> None:
                if len(data) + len(chunk) > limit:
                    raise IntegrityError(f"{path}: expected at most {limit:,} bytes, found more")
                data.extend(chunk)

            self.stream(path, 0, None, sink, limit=limit)
            return bytes(data)

        return once_more(read)


class RemoteStore(StreamStore):
    """Named files on a server, read by ranges. Thread-safe."""

    def __init__(self, location: str, options: RemoteOptions) -> None:
        self.location = location
        self.options = options
        self.counters = RemoteCounters()
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()

    @abstractmethod
    def open_body(self, path: str, offset: int, length: int | None) -> Body:
        """Ask for `length` bytes (`None`: all) from `offset`; the answer may hold fewer.

        `""` is the location itself. Raises `TransientError`, `MissingFileError`,
        `TruncatedError` for a range past the end, or `NetworkError` for what will not get
        better.
        """

    @abstractmethod
    def ask_size(self, path: str) -> int:
        """The file's length, asked from the server; raises what `open_body` raises."""

    def size(self, path: str) -> int:
        """See `Store.size`; asked once."""
        self.check_open()
        self._check_path(path)
        known = self._sizes.get(path)
        if known is None:
            known = self._repeat(path, lambda: self.ask_size(path))
            self.learn(path, known, None)
        return known

    def paths(self) -> Iterable[str]:
        """See `Store.paths`; nothing where the server does not list its files."""
        self.check_open()
        return ()

    def stream(
        self,
        path: str,
        offset: int,
        length: int | None,
        sink: Sink,
        *,
        total: int | None = None,
        limit: int | None = None,
    ) -> None:
        """See `StreamStore.stream`."""
        self.check_open()
        self._check_path(path)
        if total is not None:
            self._sizes[path] = total
        transfer = _Transfer(self, path, offset, length, sink, total, limit)
        failures = 0
        while not transfer.finished:
            before = transfer.done
            try:
                transfer.attempt()
            except TransientError as error:
                gained = transfer.done - before
                failures = 1 if gained >= _PROGRESS_BYTES else failures + 1
                self._pause(path, failures, error)

    def close(self) -> None:
        """See `Store.close`; requests that run are finished first."""
        self._closing.set()

    def count(self, *, requests: int = 0, bytes_received: int = 0) -> None:
        """Add to the counters."""
        with self._lock:
            self.counters.requests += requests
            self.counters.bytes_received += bytes_received

    def place(self, path: str) -> str:
        """How messages name a file."""
        return path or self.location

    def learn(self, path: str, found: int, expected: int | None) -> None:
        """Note a length the server gave. Raises `IntegrityError` if it is not the one known."""
        known = expected if expected is not None else self._sizes.setdefault(path, found)
        if found != known:
            source = "manifest.json" if expected is not None else "its first answer"
            self._sizes.pop(path, None)
            raise IntegrityError(
                f"{self.place(path)}: expected {known:,} bytes ({source}), "
                f"the server has {found:,}",
                hint=f"The package at {self.location} was changed or is incomplete: load it again,"
                " or ask whoever publishes it.",
            )

    def _repeat(self, path: str, ask: Callable[[], int]) -> int:
        failures = 0
        while True:
            try:
                return ask()
            except TransientError as error:
                failures += 1
                self._pause(path, failures, error)

    def _pause(self, path: str, failures: int, error: TransientError) -> None:
        """Wait before the next attempt, or raise what the failures mean."""
        options = self.options
        if failures > options.retries:
            tries = f" ({failures} attempts)" if failures > 1 else ""
            hint = None
            if error.final is NetworkError:
                hint = "What has arrived is kept: the same command goes on from there."
            raise error.final(f"{self._where(path)}: {error.reason}{tries}", hint=hint)
        with self._lock:
            self.counters.retries += 1
        pause = min(options.backoff * 2 ** (failures - 1), _LONGEST_PAUSE)
        pause = max(pause * random.uniform(0.5, 1.0), min(error.pause, _LONGEST_PAUSE))
        if self._closing.wait(pause):
            self.check_open()

    def _where(self, path: str) -> str:
        return f"{self.location}: {path}" if path else self.location

    def check_open(self) -> None:
        """Raise `ClosedError` once `close` was called."""
        if self._closing.is_set():
            raise ClosedError(f"{self.location}: the package is closed")

    @staticmethod
    def _check_path(path: str) -> None:
        if path:
            check_path(path)


class _Transfer:
    """One range on its way, over as many attempts as it takes."""

    def __init__(
        self,
        store: RemoteStore,
        path: str,
        offset: int,
        length: int | None,
        sink: Sink,
        total: int | None,
        limit: int | None,
    ) -> None:
        self.done = 0
        self._store = store
        self._path = path
        self._offset = offset
        self._length = length
        self._sink = sink
        self._total = total
        self._limit = limit
        self._tag: str | None = None
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether every byte is there."""
        return self._ended or self.done == self._length

    def attempt(self) -> None:
        """Ask for what is still missing and hand it on. Raises `TransientError` if it breaks."""
        store, path = self._store, self._path
        start = self._offset + self.done
        wanted = None if self._length is None else self._length - self.done
        if self._total is not None and wanted is not None and start + wanted > self._total:
            raise self._too_short(self._total)
        store.count(requests=1)
        body = store.open_body(path, start, wanted)
        try:
            self._check(body, start)
            self._receive(body, start)
        finally:
            body.close()

    def _check(self, body: Body, start: int) -> None:
        """Whether this is the file expected, and still the one begun with."""
        if body.total is not None:
            self._store.learn(self._path, body.total, self._total)
            if self._limit is not None and body.total > self._limit:
                raise IntegrityError(
                    f"{self._path}: expected at most {self._limit:,} bytes, found {body.total:,}"
                )
            if self._length is None:
                self._length = body.total - self._offset
            elif self._offset + self._length > body.total:
                raise self._too_short(body.total)
        if self.done and self._tag and body.tag and self._tag != body.tag:
            raise ChangedError(
                f"{self._store.place(self._path)}: replaced on the server while it was read",
                hint=f"The package at {self._store.location} was changed: load it again.",
            )
        self._tag = body.tag or self._tag
        assert body.offset <= start, "a body begins where it was asked to, or before"

    def _receive(self, body: Body, start: int) -> None:
        skip = start - body.offset
        received = 0
        patience = time.monotonic() + 2 * self._store.options.timeout
        for chunk in body.chunks():
            self._store.count(bytes_received=len(chunk))
            received += len(chunk)
            if skip:
                dropped = min(skip, len(chunk))
                skip -= dropped
                chunk = memoryview(chunk)[dropped:]
            if self._length is not None:
                chunk = chunk[: self._length - self.done]
            if len(chunk):
                self._sink(chunk)
                self.done += len(chunk)
            if self.finished:
                return
            if received < _LEAST_RATE * (time.monotonic() - patience):
                raise TransientError(f"slower than {_LEAST_RATE:,} bytes a second")
        if self._length is None:
            self._ended = True
        else:
            raise TransientError(f"the body ended after {self.done:,} of {self._length:,} bytes")

    def _too_short(self, total: int) -> TruncatedError:
        return TruncatedError(
            f"{self._path}: expected {self._length} bytes from {self._offset},"
            f" the file has {total}",
            hint="The file is shorter than the manifest says: ask whoever publishes the package.",
        )


def once_more(read: Callable[[], _Result]) -> _Result:
    """What `read` gives; repeated from its start if the file was replaced on the way."""
    try:
        return read()
    except ChangedError:
        return read()
