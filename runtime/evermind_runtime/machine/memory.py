"""How much memory this process may still take: the least of every limit that holds it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = "sys/fs/cgroup"
# cgroup v1 says "no limit" with a number near 2^63.
_NO_LIMIT = 2**60


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """Bytes, and what limits them."""

    bytes: int
    by: str


def available_memory(root: Path = Path("/")) -> AvailableMemory | None:
    """The least of the cgroup's limit (v1 and v2), MemAvailable and RLIMIT_AS.

    Page cache counts as available: the kernel gives it up. `None` where nothing is known.
    `root` is where the files of /proc and /sys are looked for.
    """
    found = [*_system(root), *_cgroups(root)]
    if root == Path("/"):
        found += _address_space()
    return min(found, key=lambda one: one.bytes, default=None)


def _system(root: Path) -> list[AvailableMemory]:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable:" in fields:
        return [AvailableMemory(fields["MemAvailable:"] * 1024, "MemAvailable")]
    with contextlib.suppress(ValueError, OSError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return [AvailableMemory(total, "the machine's whole memory")]
    return []


def _cgroups(root: Path) -> list[AvailableMemory]:
    """What each memory cgroup around this process leaves; a parent's limit holds too."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            top, names = root / _CGROUPS, ("memory.max", "memory.current", "")
            kind = "cgroup v2 memory.max"
        elif "memory" in controllers.split(","):
            top = root / _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            kind = "cgroup v1 memory.limit_in_bytes"
        else:
            continue
        limit_name, used_name, prefix = names
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # Inside a container the path may be the host's; the mount's top is then the group.
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is None or used is None or limit >= _NO_LIMIT:
                continue
            stat = _fields(folder / "memory.stat")
            cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
            found.append(AvailableMemory(max(0, limit - max(0, used - cache)), kind))
    return found


def _address_space() -> list[AvailableMemory]:
    try:
        import resource
    except ImportError:
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    taken = _fields(Path("/proc/self/status")).get("VmSize:", 0) * 1024
    return [AvailableMemory(max(0, limit - taken), "RLIMIT_AS")]


def _fields(path: Path) -> dict[str, int]:
    """`name number …` lines."""
    found = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(" " if ":" not in line else ":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name + (":" if ":" in line else "")] = int(words[0])
    return found


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
