"""Measuring the machine: places, limits, and saying what could not be measured."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from evermind_manifests.package import open_package
from evermind_runtime.machine import (
    AvailableMemory,
    available_memory,
    drop_pages,
    file_extents,
    measure_machine,
    page_cache,
    shard_extents,
)
from evermind_runtime.machine import disk as disk_module
from evermind_runtime.machine.disk import Extent, measure_disk, temporary_extents
from evermind_runtime.machine.processor import call_seconds, matmul_rate, memory_rate, sha256_rate

from tests.packages import export, lm_source


def opener(path: Path) -> Any:
    return lambda flags: os.open(path, os.O_RDONLY | flags)


def test_the_least_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [("MemAvailable", 2**34), ("the control group's memory.max", 2**20)]
    monkeypatch.setattr("evermind_runtime.machine.memory.memory_limits", lambda: limits)
    found = available_memory()
    assert found is not None
    assert (found.bytes, found.by) == (2**20, "the control group's memory.max")
    monkeypatch.setattr("evermind_runtime.machine.memory.memory_limits", list)
    found = available_memory()
    assert found is not None
    assert found.by in ("the machine's whole memory", "RLIMIT_AS")


def test_an_address_space_limit_is_seen() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, before[1]))
        found = available_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert found is not None
    assert found.by == "RLIMIT_AS"
    assert 2**27 < found.bytes <= 2**28


@pytest.mark.parametrize("form", ["folder", "package.zip"])
def test_extents_are_the_shards_own_bytes(form: str, tmp_path: Path) -> None:
    path = export(lm_source(), tmp_path / form)
    with open_package(path) as package:
        extents = shard_extents(package)
        assert len(extents) == len(package.manifest.shards) == 24
        for shard, extent in zip(package.manifest.shards, extents, strict=True):
            fd = extent.open(0)
            found = os.pread(fd, extent.bytes, extent.offset)
            os.close(fd)
            expected = bytearray(shard.bytes)
            package.store.read_into(shard.file, shard.offset, memoryview(expected))
            assert found == expected
        assert sum(extent.bytes for extent in file_extents(package)) == sum(
            entry.bytes for entry in package.manifest.files.values()
        )
        rates = measure_disk(extents, seconds=0.05)
        assert rates.rate > 0
        assert rates.cached_rate > 0
        assert rates.block % 4096 == 0


def test_without_files_a_temporary_one_is_read_and_removed(tmp_path: Path) -> None:
    machine = measure_machine(
        [], tmp_path, block=100_000, working_set=2**20, threads=1, seconds=0.1
    )
    assert machine.disk_where == f"a temporary file in {tmp_path}"
    assert machine.block == 102_400
    assert list(tmp_path.iterdir()) == []
    assert machine.to_dict()["threads"] == 1
    assert machine.with_disk_rate(1.0).disk_how == "given"


def test_a_machine_with_little_memory_survives_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    little = AvailableMemory(40 * 2**20, "the control group's memory.max")
    monkeypatch.setattr("evermind_runtime.machine.available_memory", lambda: little)
    monkeypatch.setattr(
        "evermind_runtime.machine.memory_rate", lambda _, size, **__: asked.append(size) or 1.0
    )
    measure_machine([], tmp_path, block=4096, working_set=2**30, threads=1, seconds=0.1)
    assert asked == [10 * 2**20]


def test_where_nothing_can_be_written_another_place_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    machine = measure_machine([], missing, block=4096, working_set=1, threads=1, seconds=0.1)
    assert "missing" not in machine.disk_where


def test_a_place_without_direct_reads_is_measured_uncached_or_says_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    with temporary_extents(tmp_path, 2**20) as extents:
        monkeypatch.setattr(disk_module.page_cache, "cached_bytes", lambda *_: 0)
        assert measure_disk(extents, seconds=0.05).how == "uncached"
        monkeypatch.setattr(disk_module.page_cache, "cached_bytes", lambda *_: None)
        rates = measure_disk(extents, seconds=0.05)
    assert rates.how == "cached"
    assert rates.rate == rates.cached_rate


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        measure_disk([Extent(opener(tmp_path / "gone"), 0, 4096)], seconds=0.01)


def test_what_breaks_off_leaves_no_reader_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes to the thread that waits; what the others read is closed soon after."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2**20))
    extents = [Extent(opener(path), 0, 2**20)]
    join, broken = threading.Thread.join, iter([True])

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if next(broken, False):
            raise KeyboardInterrupt
        join(self, timeout)

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_disk(extents, seconds=60)
    assert threading.active_count() == before


def test_pages_of_a_mapped_file_stay_and_that_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2**20))
    extent = Extent(opener(path), 0, 2**20)
    with path.open("rb") as file:
        if page_cache.cached_bytes(file.fileno(), 0, 2**20) is None:
            pytest.skip("this system does not tell what its page cache holds")
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert sum(mapped[at] for at in range(0, 2**20, 4096)) == 0
            assert page_cache.cached_bytes(file.fileno(), 0, 2**20) == 2**20
            assert not drop_pages([extent])


def test_rates_are_those_of_a_processor() -> None:
    # Bounds that any machine keeps by orders of magnitude: units and counts, not speed.
    assert 1e8 < memory_rate(2, 2**22, seconds=0.05) < 1e14
    assert 1e8 < matmul_rate(1, seconds=0.05) < 1e14
    assert 1e7 < sha256_rate(seconds=0.05) < 1e12
    assert 1e-9 < call_seconds(seconds=0.05) < 1e-4
