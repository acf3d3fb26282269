"""What every store must do: inherit `StoreTests` and give it a store of `FILES`."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from evermind_manifests.errors import (
    ClosedError,
    EvermindPackError,
    IntegrityError,
    MissingFileError,
    TruncatedError,
)
from evermind_manifests.store import Store

FILES = {
    "manifest.json": b"{}",
    "experts/l000/e0000.moe0": bytes(range(256)) * 300,
    "experts/l000/e0001.moe0": b"x" * 5000,
    "graphs/empty.onnx": b"",
    "graphs/größe.onnx": b"unicode",
} | {f"experts/l001/e{i:04d}.moe0": bytes([i]) * (i + 1) for i in range(100)}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class StoreTests:
    """The contract of `Store`; a subclass has the fixture `store`."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def test_sizes_and_contents(self, store: Store) -> None:
        for path, data in FILES.items():
            assert store.size(path) == len(data)
            assert store.read(path, limit=len(data)) == data

    def test_ranges(self, store: Store) -> None:
        path = "experts/l000/e0000.moe0"
        for offset, length in ((0, 0), (0, 10), (255, 2), (70000, 6800), (76800, 0)):
            buffer = bytearray(b"?" * length)
            store.read_into(path, offset, memoryview(buffer))
            assert buffer == FILES[path][offset : offset + length]

    def test_a_typed_buffer_is_filled_too(self, store: Store) -> None:
        buffer = memoryview(bytearray(256)).cast("I")
        store.read_into("experts/l000/e0000.moe0", 256, buffer)
        assert buffer.tobytes() == bytes(range(256))

    @pytest.mark.parametrize(("offset", "length"), [(4999, 2), (5001, 1), (2**62, 1)])
    def test_the_end_of_a_file(self, store: Store, offset: int, length: int) -> None:
        with pytest.raises((TruncatedError, IntegrityError), match="e0001"):
            store.read_into("experts/l000/e0001.moe0", offset, memoryview(bytearray(length)))

    def test_a_limit_is_checked_before_reading(self, store: Store) -> None:
        with pytest.raises(IntegrityError, match="expected at most 4,999 bytes, found 5,000"):
            store.read("experts/l000/e0001.moe0", limit=4999)

    @pytest.mark.parametrize(
        "path",
        ["nothing.json", "experts", "experts/l000", "manifest.json/x", "../x", "/etc/passwd"],
    )
    def test_what_is_not_there(self, store: Store, path: str) -> None:
        for read in (store.size, lambda p: store.read(p, limit=10)):
            with pytest.raises(EvermindPackError) as caught:
                read(path)
            assert path in str(caught.value)

    def test_missing_files_are_file_not_found(self, store: Store) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            store.size("nothing.json")
        assert isinstance(caught.value, MissingFileError)

    def test_paths(self, store: Store) -> None:
        assert list(store.paths()) == sorted(FILES)

    def test_many_threads(self, store: Store) -> None:
        """More files than descriptors are cached, read by threads at once."""

        def read(seed: int) -> None:
            order = sorted(FILES)
            random.Random(seed).shuffle(order)
            for path in order:
                assert store.read(path, limit=100_000) == FILES[path]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(8)))

    def test_a_closed_store_says_so(self, store: Store) -> None:
        with store:
            store.size("manifest.json")
        store.close()
        for read in (
            lambda: store.size("manifest.json"),
            lambda: store.size("nothing.json"),
            lambda: store.read("manifest.json", limit=10),
            lambda: store.read_into("manifest.json", 0, memoryview(bytearray(2))),
            lambda: list(store.paths()),
        ):
            with pytest.raises(ClosedError, match="the package is closed"):
                read()

    def test_closing_waits_for_the_reads_that_run(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A descriptor's number may be given to another file as soon as it is closed."""
        path = "experts/l000/e0000.moe0"
        store.size(path)
        before = open_descriptors()
        begun, closed = threading.Event(), threading.Event()
        preadv = os.preadv

        def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
            begun.set()
            assert closed.wait(60)
            return preadv(fd, buffers, offset)

        with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
            patched.setattr(os, "preadv", slow)
            reading = pool.submit(store.read, path, limit=100_000)
            assert begun.wait(60)
            store.close()
            closed.set()
            assert reading.result(60) == FILES[path]
        with pytest.raises(ClosedError):
            store.read(path, limit=100_000)
        assert open_descriptors() < before
