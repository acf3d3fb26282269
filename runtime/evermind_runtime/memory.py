"""How much memory this process may still use: the machine's, and its control group's.

Linux only; elsewhere nobody knows. The files' forms: proc(5), and the kernel's documents on
control groups, versions 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# (limit, use, keys in memory.stat of what is page cache, and of what in it is shared memory)
_VERSIONS = {
    "": ("memory.max", "memory.current", "file", "shmem"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
}


def available_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that can be had, counting what the page cache would give back; `None` if unknown."""
    return min((size for _, size in memory_limits(proc, cgroups)), default=None)


def memory_limits(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> list[tuple[str, int]]:
    """Everything that limits it, by name, with the bytes it leaves; empty if unknown."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        machine = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return []
    return [("MemAvailable", machine), *_group_limits(proc, cgroups)]


def _group_limits(proc: Path, cgroups: Path) -> Iterator[tuple[str, int]]:
    """What each group above this process still allows."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in _VERSIONS:
            continue
        root = cgroups / controllers
        # In a container the group's own folder may be the root of what is mounted.
        folder = root / path.lstrip("/")
        for one in (folder, *folder.parents):
            if not one.is_relative_to(root):
                break
            left = _left(one, *_VERSIONS[controllers])
            if left is not None:
                yield f"the control group's {_VERSIONS[controllers][0]}", left


def _left(folder: Path, limit: str, usage: str, cached: str, shared: str) -> int | None:
    try:
        allowed, used = (int((folder / name).read_text()) for name in (limit, usage))
        stat = (folder / "memory.stat").read_text().splitlines()
        sizes = dict(line.split() for line in stat)
        # Shared memory and tmpfs are counted with the page cache, but nothing gives them back.
        cache = int(sizes[cached]) - int(sizes.get(shared, 0))
    except (OSError, KeyError, ValueError):
        # There is no limit here ("max"), or no such file.
        return None
    return max(0, allowed - used + cache)
