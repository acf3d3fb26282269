"""A package on a server, read through the cache on disk: each blob is fetched once, ever.

Reads are demands: they go first. What a step will read is announced with `expect`, so that its
experts come together rather than one after the other. `prefetch` works in the background and
starts nothing while a demand is being fetched; `fetch` does the same in the foreground.
"""

from __future__ import annotations

import os
import threading
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from evermind_manifests.errors import (
    ClosedError,
    DigestError,
    EvermindPackError,
    IntegrityError,
    MissingFileError,
    OfflineError,
    ShardDigestError,
    TruncatedError,
)
from evermind_manifests.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from evermind_manifests.package import check_digest, digest_error
from evermind_manifests.store import Store, read_exactly

from .blobs import Blob, Fetch, blobs_by_path, plan_fetches
from .disk_cache import DiskCache, Part, WrongDigestError
from .remote import Sink, StreamStore, once_more

Progress: TypeAlias = Callable[[int, int], None]

# Background work that fails this often in a row stops: whoever needs the bytes will see why.
_PREFETCH_FAILURES = 3
_BLOCK = 1 << 20


class CacheWarning(UserWarning):
    """The cache cannot be used; bytes are fetched again each time."""


@dataclass(slots=True)
class CachedCounters:
    """`hits`: blobs found in the cache; `fetched`: blobs that came over the network."""

    hits: int = 0
    fetched: int = 0


class CachedStore(Store):
    """A package's files, from the cache or else from `remote`. Thread-safe.

    Sizes and names are the manifest's; every byte handed out has passed its blob's sha256
    (but for a pool's padding, which has none). Without `remote` only what is cached can be
    read, anything else raises `OfflineError`.
    """

    local = False

    def __init__(
        self,
        remote: StreamStore | None,
        cache: DiskCache,
        manifest: Manifest,
        manifest_bytes: bytes,
        location: str,
        *,
        concurrency: int = 4,
    ) -> None:
        """Owns `remote`."""
        self.location = location
        self.remote = remote
        self.cache = cache
        self.counters = CachedCounters()
        self._manifest = manifest
        self._data = manifest_bytes
        self._blobs = blobs_by_path(manifest)
        self._starts = {
            path: [blob.offset for blob in blobs] for path, blobs in self._blobs.items()
        }
        self._experts = {
            (one.layer, one.expert): Blob(one.sha256, one.file, one.offset, one.bytes)
            for one in manifest.shards
        }
        #: Digests that this store once had or asked for.
        self._seen: set[str] = set()
        self._concurrency = concurrency
        self._state = threading.Condition()
        self._demands = 0
        self._closed = False
        self._urgent: deque[Fetch] = deque()
        self._later: deque[Fetch] = deque()
        self._workers: list[threading.Thread] = []
        self._warned = False

    def size(self, path: str) -> int:
        """See `Store.size`; as the manifest has it."""
        self._check_open()
        if path == SIGNATURE_NAME and self.remote is not None:
            return self.remote.size(path)
        return len(self._data) if path == MANIFEST_NAME else self._entry(path)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`. Raises also `NetworkError` and `DigestError`."""
        view = buffer.cast("B")
        size = self.size(path)
        if offset < 0 or offset + len(view) > size:
            raise TruncatedError(
                f"{path}: expected {len(view)} bytes from {offset}, the file has {size}"
            )
        if path == MANIFEST_NAME:
            view[:] = self._data[offset : offset + len(view)]
            return
        blobs = self._blobs[path]
        at = max(0, bisect_right(self._starts[path], offset) - 1)
        while len(view):
            blob = blobs[at] if at < len(blobs) else None
            if blob is not None and blob.offset <= offset < blob.end:
                count = min(len(view), blob.end - offset)
                self._read_blob(blob, offset - blob.offset, view[:count])
            else:
                # Before the next blob: a pool's padding.
                at += blob is not None and offset >= blob.end
                following = blobs[at].offset if at < len(blobs) else size
                count = min(len(view), following - offset)
                if count:
                    self._read_padding(path, offset, view[:count])
            offset += count
            view = view[count:]
            at += at < len(blobs) and offset >= blobs[at].end

    def read(self, path: str, *, limit: int) -> bytes:
        """See `Store.read`. The signature, which no manifest names, is not cached."""
        if path == SIGNATURE_NAME and self.remote is not None:
            return self.remote.read(path, limit=limit)
        size = self.size(path)
        if size > limit:
            raise IntegrityError(f"{path}: expected at most {limit:,} bytes, found {size:,}")
        data = bytearray(size)
        self.read_into(path, 0, memoryview(data))
        return bytes(data)

    def paths(self) -> Iterable[str]:
        """See `Store.paths`; those the manifest names."""
        self._check_open()
        return sorted([MANIFEST_NAME, *self._blobs])

    def pass_through(self, path: str, offset: int, sink: Sink) -> None:
        """Give `sink` the file's bytes from `offset` on, unchecked.

        Blobs in the cache are read there; the others come from the server and are not kept.
        """
        size = self.size(path)
        for blob in self._blobs[path]:
            fd = self.cache.find(blob.digest) if blob.end > offset else None
            if fd is None:
                continue
            with os.fdopen(fd, "rb") as file:
                self._pass_on(path, offset, blob.offset, sink)
                offset = max(offset, blob.offset)
                file.seek(offset - blob.offset)
                while block := file.read(_BLOCK):
                    sink(block)
                    offset += len(block)
        self._pass_on(path, offset, size, sink)

    def _pass_on(self, path: str, begin: int, end: int, sink: Sink) -> None:
        """Give `sink` the server's bytes, if there are any in between."""
        if begin >= end:
            return
        if self.remote is None:
            raise self._offline(Blob("", path, begin, end - begin))
        self.remote.stream(path, begin, end - begin, sink, total=self._entry(path))

    def missing(self, blobs: Iterable[Blob]) -> list[Blob]:
        """Those that are not in the cache, each digest once."""
        unique = {blob.digest: blob for blob in blobs}
        return [blob for blob in unique.values() if not self.cache.has(blob.digest, blob.bytes)]

    def blobs_of(self, paths: Iterable[str]) -> list[Blob]:
        """The blobs of whole files."""
        return [blob for path in paths for blob in self._blobs[path]]

    def blobs_of_experts(self, keys: Iterable[tuple[int, int]]) -> list[Blob]:
        """The shards of (layer, expert) keys, in their order."""
        return [self._experts[key] for key in keys if key in self._experts]

    def expect(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """A step is about to read the experts its tokens are routed to: begin to fetch them.

        Returns at once. A shard is fetched so once at most, however long it is kept.
        """
        keys = sorted({(layer, expert) for token in tokens for expert in token})
        blobs = [one for one in self.blobs_of_experts(keys) if one.digest not in self._seen]
        # A single one is fetched by whoever reads it.
        if len(blobs) < 2 or self.remote is None:
            return
        self._seen.update(blob.digest for blob in blobs)
        try:
            jobs = plan_fetches(self.missing(blobs))
        except OSError:
            return  # who reads them will see that there is no cache
        with self._state:
            self._urgent.extend(jobs)
            self._start_workers()

    def fetch(self, blobs: Iterable[Blob], progress: Progress = lambda done, total: None) -> int:
        """Bring all of `blobs` into the cache, several requests at a time; the bytes fetched.

        `progress(done, total)` counts bytes. Raises what reading them would raise, and
        `OSError` where the cache cannot be written. What was fetched before an error or
        Ctrl-C stays.
        """
        missing = self.missing(blobs)
        total = sum(blob.bytes for blob in missing)
        progress(0, total)
        if not missing:
            return 0
        if self.remote is None:
            raise self._offline(missing[0])
        stop = threading.Event()
        done = 0
        lock = threading.Lock()

        def one(job: Fetch) -> None:
            nonlocal done
            self._download(job, stop.is_set)
            for blob in job.blobs:
                # What somebody else was at, or what came damaged.
                if not stop.is_set() and not self.cache.has(blob.digest, blob.bytes):
                    os.close(self._obtain(blob))
            with lock:
                done += sum(blob.bytes for blob in job.blobs)
                progress(done, total)

        pool = ThreadPoolExecutor(self._concurrency, "evermind-fetch")
        try:
            futures = [pool.submit(one, job) for job in plan_fetches(missing)]
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        return total

    def prefetch(self, blobs: Iterable[Blob]) -> None:
        """Fetch `blobs` (most urgent first) in the background, as long as nothing is demanded.

        Replaces what an earlier call has not begun yet. Failures are silent here: whoever
        needs the bytes will see them.
        """
        jobs = plan_fetches(self.missing(blobs)) if self.remote is not None else []
        with self._state:
            self._later = deque(jobs)
            self._start_workers()

    def cache_failed(self, error: OSError) -> None:
        """Say once, as a `CacheWarning`, that the cache cannot be used."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.cache.root}: the cache cannot be used ({error.strerror or error}): "
                "experts are fetched each time they are needed",
                CacheWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """See `Store.close`; background work ends first."""
        with self._state:
            self._closed = True
            self._urgent.clear()
            self._later.clear()
            self._state.notify_all()
        if self.remote is not None:
            self.remote.close()
        for worker in self._workers:
            # They wait for bytes at most as long as a request may.
            worker.join(1.0)

    def _start_workers(self) -> None:
        """One for each job, as far as so many may be in flight. With `_state` held."""
        if self._closed:
            return
        alive = [worker for worker in self._workers if worker.is_alive()]
        wanted = min(len(self._urgent) + len(self._later), self._concurrency)
        for _ in range(wanted - len(alive)):
            worker = threading.Thread(target=self._work, name="evermind-fetch", daemon=True)
            alive.append(worker)
            worker.start()
        self._workers = alive
        self._state.notify_all()

    def _work(self) -> None:
        failures = 0
        while failures < _PREFETCH_FAILURES and (job := self._next()):
            try:
                self._download(job, lambda: self._closed)
                failures = 0
            except (EvermindPackError, OSError):
                failures += 1

    def _next(self) -> Fetch | None:
        """What to fetch in the background; None when there is nothing left."""
        with self._state:
            while not self._closed:
                if self._urgent:
                    return self._urgent.popleft()
                if not self._later:
                    return None
                if not self._demands:
                    return self._later.popleft()
                self._state.wait()
            return None

    def _download(self, job: Fetch, stopped: Callable[[], bool]) -> None:
        """One planned request into the cache, less what is there or being fetched by others."""
        parts: dict[str, Part] = {}
        try:
            for blob in job.blobs:
                if part := self.cache.claim(blob.digest, blob.bytes):
                    parts[blob.digest] = part
            claimed = [blob for blob in job.blobs if blob.digest in parts]
            begun = [blob for blob in claimed if parts[blob.digest].done]
            for blob in begun:
                done = parts[blob.digest].done
                rest = Blob(blob.digest, blob.path, blob.offset + done, blob.bytes - done)
                self._stream(Fetch(rest.path, rest.offset, rest.bytes, (rest,)), parts, stopped)
            for one in plan_fetches(blob for blob in claimed if blob not in begun):
                self._stream(one, parts, stopped)
        finally:
            for part in parts.values():
                part.close()

    def _stream(self, job: Fetch, parts: dict[str, Part], stopped: Callable[[], bool]) -> None:
        """Split a range among its blobs; each is an object as soon as it is whole."""
        assert self.remote is not None
        pending = deque(job.blobs)
        at = job.offset

        def finish() -> None:
            part = parts[pending.popleft().digest]
            try:
                self.cache.admit(part)
                self.counters.fetched += 1
            except WrongDigestError:
                pass  # a demand will ask again, and tell
            part.close()

        def sink(chunk: bytes | memoryview) -> None:
            nonlocal at
            view = memoryview(chunk)
            while len(view) and pending:
                blob = pending[0]
                skipped = min(len(view), max(0, blob.offset - at))
                taken = min(len(view) - skipped, blob.end - at - skipped)
                if taken:
                    parts[blob.digest].write(view[skipped : skipped + taken])
                at += skipped + taken
                view = view[skipped + taken :]
                if at == blob.end:
                    finish()
            if stopped():
                raise ClosedError(f"{self.location}: stopped")

        total = self._entry(job.path)
        if job.bytes:
            self.remote.stream(job.path, job.offset, job.bytes, sink, total=total)
        while pending and pending[0].end <= at:
            finish()  # without a byte of its own to wait for

    def _read_blob(self, blob: Blob, at: int, view: memoryview) -> None:
        """Fill `view` from the blob's byte `at` on."""
        try:
            fd = self._obtain(blob)
        except EvermindPackError:
            raise
        except OSError as error:
            self.cache_failed(error)
            view[:] = self._fetch_directly(blob)[at : at + len(view)]
            return
        try:
            read_exactly(fd, at, view, blob.path)
        finally:
            os.close(fd)

    def _obtain(self, blob: Blob) -> int:
        """A descriptor of the blob in the cache, downloaded if need be."""
        self._seen.add(blob.digest)
        fd = self.cache.find(blob.digest)
        if fd is not None:
            self.counters.hits += 1
            return fd
        with self._demand(blob):
            try:
                fd = self.cache.fetch(blob.digest, blob.bytes, self._downloader(blob))
            except WrongDigestError as error:
                raise self._mismatch(blob, error.found) from None
        self.counters.fetched += 1
        return fd

    def _downloader(self, blob: Blob) -> Callable[[int, Sink], None]:
        remote = self.remote
        if remote is None:
            raise self._offline(blob)

        def download(begin: int, sink: Sink) -> None:
            total = self._entry(blob.path)
            remote.stream(blob.path, blob.offset + begin, blob.bytes - begin, sink, total=total)

        return download

    def _fetch_directly(self, blob: Blob) -> bytearray:
        """The blob without the cache; asked for once more if it comes wrong."""
        download = self._downloader(blob)

        def attempt() -> bytearray:
            data = bytearray()
            download(0, data.extend)
            return data

        with self._demand(blob):
            data = once_more(attempt)
            where, field, kind = self._names(blob)
            try:
                check_digest(data, blob.digest, where, field, kind, self.location)
            except DigestError:
                data = once_more(attempt)
                check_digest(data, blob.digest, where, field, kind, self.location)
        self.counters.fetched += 1
        return data

    def _read_padding(self, path: str, offset: int, view: memoryview) -> None:
        if self.remote is None:
            raise self._offline(Blob("", path, offset, len(view)))
        self.remote.read_into(path, offset, view)

    @contextmanager
    def _demand(self, blob: Blob) -> Iterator[None]:
        """Background work starts nothing meanwhile."""
        if self.remote is None:
            raise self._offline(blob)
        with self._state:
            self._demands += 1
        try:
            yield
        finally:
            with self._state:
                self._demands -= 1
                self._state.notify_all()

    def _mismatch(self, blob: Blob, found: str) -> DigestError:
        where, field, kind = self._names(blob)
        return digest_error(blob.digest, found, where, field, kind, self.location)

    def _names(self, blob: Blob) -> tuple[str, str, type[DigestError]]:
        """How an error calls the blob: place, field of the manifest, kind of error."""
        where = f"{blob.path}@{blob.offset}" if blob.offset else blob.path
        for (layer, expert), shard in self._experts.items():
            if shard.digest == blob.digest:
                return where, f"shard of layer {layer}, expert {expert}", ShardDigestError
        return where, f"files[{blob.path!r}]", DigestError

    def _entry(self, path: str) -> int:
        entry = self._manifest.files.get(path)
        if entry is None:
            raise MissingFileError(f"{path}: is not a file of the package at {self.location}")
        return entry.bytes

    def _offline(self, blob: Blob) -> OfflineError:
        return OfflineError(
            f"{self.location}: {blob.path}: not in the cache, and the network may not be used",
            hint=f"Fetch it first: `evermind-pack pull {self.location}`.",
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.location}: the package is closed")
