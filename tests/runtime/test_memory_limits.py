"""What is left of the machine's memory, and of the control groups', as the kernel tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
from evermind_runtime.memory import available_bytes

KIB = 1024


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal:  4000 kB\nMemAvailable:    3000 kB\nHugePages_Total: 0\n"
    )
    return tmp_path / "proc"


def group(folder: Path, limit: str, used: int, stat: str, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(text + "\n")
    (folder / "memory.stat").write_text(stat)


def test_without_groups_it_is_the_machines(proc: Path, tmp_path: Path) -> None:
    assert available_bytes(proc, tmp_path / "none") == 3000 * KIB


def test_the_page_cache_of_a_group_counts_as_available(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/app/worker\n")
    groups = tmp_path / "groups"
    group(groups / "app" / "worker", "max", 0, "file 0\n", version=2)
    group(groups / "app", str(1000 * KIB), 900 * KIB, f"anon 1\nfile {600 * KIB}\n", version=2)
    assert available_bytes(proc, groups) == 700 * KIB


def test_the_first_version_of_groups(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:cpu:/x\n4:memory:/not/mounted/here\n")
    groups = tmp_path / "groups"
    group(groups / "memory", str(500 * KIB), 450 * KIB, f"total_cache {50 * KIB}\n", version=1)
    assert available_bytes(proc, groups) == 100 * KIB


@pytest.mark.parametrize(
    ("version", "cache", "shared"),
    [(1, "total_cache", "total_shmem"), (2, "file", "shmem")],
)
def test_shared_memory_is_no_page_cache(
    proc: Path, tmp_path: Path, version: int, cache: str, shared: str
) -> None:
    (proc / "self" / "cgroup").write_text("4:memory:/\n" if version == 1 else "0::/\n")
    groups = tmp_path / "groups"
    stat = f"{cache} {400 * KIB}\n{shared} {300 * KIB}\n"
    folder = groups / "memory" if version == 1 else groups
    group(folder, str(1000 * KIB), 800 * KIB, stat, version=version)
    assert available_bytes(proc, groups) == 300 * KIB


@pytest.mark.parametrize("text", ["", "MemTotal: 1 kB\n", "MemAvailable: many\n"])
def test_what_cannot_be_read_is_not_known(proc: Path, tmp_path: Path, text: str) -> None:
    (proc / "meminfo").write_text(text)
    assert available_bytes(proc, tmp_path) is None
    (proc / "meminfo").unlink()
    assert available_bytes(proc, tmp_path) is None
