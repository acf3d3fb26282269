"""The cache on disk: shared, bounded, and whole whenever its user is killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from evermind_manifests.errors import ChangedError, NetworkError
from evermind_runtime.stores.disk_cache import DiskCache, WrongDigestError
from evermind_runtime.stores.remote import Sink


def blob(seed: int, size: int = 5000) -> tuple[str, bytes]:
    data = random.Random(seed).randbytes(size)
    return hashlib.sha256(data).hexdigest(), data


class Origin:
    """Counts the bytes it gives."""

    def __init__(self, data: bytes, *, step: int = 1000, pause: float = 0.0) -> None:
        self.data = data
        self.given = 0
        self.step = step
        self.pause = pause

    def __call__(self, begin: int, sink: Sink) -> None:
        for at in range(begin, len(self.data), self.step):
            block = self.data[at : at + self.step]
            time.sleep(self.pause)
            sink(block)
            self.given += len(block)


def read(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def held(cache: DiskCache) -> int:
    return sum(entry.bytes for entry in cache.entries())


def test_fetched_once_and_found_again(tmp_path: Path) -> None:
    digest, data = blob(0)
    origin = Origin(data)
    for _ in range(3):
        cache = DiskCache(tmp_path, 1 << 20)
        assert read(cache.fetch(digest, len(data), origin)) == data
    assert origin.given == len(data)
    assert [entry.complete for entry in cache.entries()] == [True]
    empty = hashlib.sha256(b"").hexdigest()
    assert read(cache.fetch(empty, 0, Origin(b""))) == b""


def test_a_broken_download_goes_on(tmp_path: Path) -> None:
    digest, data = blob(1)
    origin = Origin(data)

    def breaks(begin: int, sink: Sink) -> None:
        sink(data[:2500])
        raise NetworkError("gone")

    cache = DiskCache(tmp_path, 1 << 20)
    with pytest.raises(NetworkError):
        cache.fetch(digest, len(data), breaks)
    assert read(cache.fetch(digest, len(data), origin)) == data
    assert origin.given == 2500


def test_wrong_content_is_fetched_once_more(tmp_path: Path) -> None:
    digest, data = blob(2)
    answers = [b"x" * len(data), data]
    cache = DiskCache(tmp_path, 1 << 20)
    assert read(cache.fetch(digest, len(data), lambda begin, sink: sink(answers.pop(0)))) == data
    other, _ = blob(3)
    asked: list[int] = []

    def wrong(begin: int, sink: Sink) -> None:
        asked.append(begin)
        sink(b"x" * len(data))

    with pytest.raises(WrongDigestError):
        cache.fetch(other, len(data), wrong)
    assert asked == [0, 0]
    assert cache.find(other) is None


def test_what_changed_in_the_middle_begins_again(tmp_path: Path) -> None:
    digest, data = blob(4)
    begun: list[int] = []

    def download(begin: int, sink: Sink) -> None:
        begun.append(begin)
        if len(begun) == 1:
            sink(b"old" * 10)
            raise ChangedError("replaced")
        sink(data[begin:])

    assert read(DiskCache(tmp_path, 1 << 20).fetch(digest, len(data), download)) == data
    assert begun == [0, 0]


@pytest.mark.parametrize("left", [b"", b"garbage", b"y" * 9000])
def test_leftovers_of_any_kind(tmp_path: Path, left: bytes) -> None:
    digest, data = blob(5)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / f"{digest}.part").write_bytes(left)
    assert read(DiskCache(tmp_path, 1 << 20).fetch(digest, len(data), Origin(data))) == data


def test_rot_is_found_at_first_use(tmp_path: Path) -> None:
    digest, data = blob(6)
    cache = DiskCache(tmp_path, 1 << 20)
    os.close(cache.fetch(digest, len(data), Origin(data)))
    (path,) = tmp_path.glob("objects/*/*")
    assert path.stat().st_mode & 0o222 == 0
    path.chmod(0o600)
    path.write_bytes(data[:-1] + b"!")
    again = DiskCache(tmp_path, 1 << 20)  # a new process
    assert again.find(digest) is None
    assert read(again.fetch(digest, len(data), Origin(data))) == data


def test_threads_share_one_download(tmp_path: Path) -> None:
    digest, data = blob(7, 20_000)
    origin = Origin(data, pause=0.002)
    cache = DiskCache(tmp_path, 1 << 20)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read(cache.fetch(digest, len(data), origin)), range(8)))
    assert set(found) == {data}
    assert origin.given == len(data)


def test_the_bound_holds_and_the_oldest_goes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 20_000)
    blobs = [blob(seed) for seed in range(10, 20)]
    for at, (digest, data) in enumerate(blobs):
        os.close(cache.fetch(digest, len(data), Origin(data)))
        assert held(cache) <= 20_000
        for path in tmp_path.glob(f"objects/*/{digest}"):
            os.utime(path, (at, at))
    assert cache.has(blobs[-1][0], 5000)
    assert not cache.has(blobs[0][0], 5000)


def test_what_is_in_use_is_not_evicted(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 12_000)
    first, data = blob(30)
    fd = cache.fetch(first, len(data), Origin(data))
    for seed in range(31, 35):
        digest, other = blob(seed)
        os.close(cache.fetch(digest, len(other), Origin(other)))
        assert cache.has(first, len(data))
    assert cache.evict(0).entries >= 1
    assert cache.has(first, len(data))
    assert read(fd) == data
    cache.evict(0)
    assert not cache.has(first, len(data))


def test_without_room_bytes_are_only_lent(tmp_path: Path) -> None:
    digest, data = blob(40)
    cache = DiskCache(tmp_path, 100)
    assert read(cache.fetch(digest, len(data), Origin(data))) == data
    assert held(cache) == 0


def test_a_lost_count_is_counted_again(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 20_000)
    for seed in range(50, 60):
        digest, data = blob(seed)
        os.close(cache.fetch(digest, len(data), Origin(data)))
        (tmp_path / "usage").write_text(["", "nonsense", "0"][seed % 3])
    # "0" may hide what is there until the next full count: one blob at most slips in by it.
    assert held(cache) <= 20_000 + 5_000 * 4
    (tmp_path / "usage").unlink()
    digest, data = blob(60)
    os.close(cache.fetch(digest, len(data), Origin(data)))
    assert held(cache) <= 20_000


def test_a_download_that_stands_still_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_runtime.stores.disk_cache._STALLED", 0.05)
    digest, data = blob(70)
    cache = DiskCache(tmp_path, 1 << 20)
    part = cache.claim(digest, len(data))
    assert part is not None
    assert cache.claim(digest, len(data)) is None
    with pytest.raises(NetworkError, match="stood still"):
        DiskCache(tmp_path, 1 << 20).fetch(digest, len(data), Origin(data))
    part.close()


def test_one_that_waits_takes_over_from_one_that_failed(tmp_path: Path) -> None:
    digest, data = blob(71)
    cache = DiskCache(tmp_path, 1 << 20)
    part = cache.claim(digest, len(data))
    assert part is not None
    part.write(data[:3000])
    origin = Origin(data)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: read(cache.fetch(digest, len(data), origin)))
        time.sleep(0.05)
        part.close()
        assert waiting.result(30) == data
    assert origin.given == 2000


WRITER = """
import os, sys, time
from pathlib import Path
from evermind_runtime.stores.disk_cache import DiskCache
from tests.network.test_disk_cache import Origin, blob
cache = DiskCache(Path(sys.argv[1]), 60_000)
print("ready", flush=True)
for seed in range(int(sys.argv[2]), 100000):
    digest, data = blob(1000 + seed % 40, 4000)
    os.close(cache.fetch(digest, len(data), Origin(data, step=500)))
"""


def test_killed_at_any_point(tmp_path: Path) -> None:
    """Two writers are killed again and again; every object is whole, and the bound holds."""
    rng = random.Random(0)
    for round_ in range(2):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path), str(round_ * 7 + at * 11)],
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[2],
            )
            for at in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.25))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
        for path in tmp_path.glob("objects/*/*"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    cache = DiskCache(tmp_path, 60_000)
    digest, data = blob(2000, 4000)
    os.close(cache.fetch(digest, len(data), Origin(data)))
    # Two writers may each have left one unfinished download.
    assert held(cache) <= 60_000 + 2 * 4000
    assert cache.verify(lambda done, total: None) == []


def _download(root: str, log: str) -> None:
    digest, data = blob(80, 30_000)
    origin = Origin(data, pause=0.001)
    assert read(DiskCache(Path(root), 1 << 20).fetch(digest, len(data), origin)) == data
    with open(log, "a") as file:
        file.write(f"{origin.given}\n")


def test_processes_share_one_download(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")
    log = tmp_path / "log"
    arguments = (str(tmp_path / "cache"), str(log))
    workers = [context.Process(target=_download, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == [0, 0, 30_000]
