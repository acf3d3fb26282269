"""A process that locks all memory but so much: what is left for the rest is its limit.

What is evicted, and when, is the kernel's own business: pages of files stand in its lists, and
those that are read again soon stay longer. All processes share what is left, so nothing else
should run. The kernel ends this process first when memory is short, and it lets go by itself
when others need more than they were to have. Linux without swap, as root.

`memory_limit` starts it and talks to it in lines: the most bytes to be used beside what processes
have now, answered when no more can be; then a line with anything, answered with what was used at
most, and the end.
"""

from __future__ import annotations

import ctypes
import mmap
import select
import sys
from pathlib import Path
from typing import NamedTuple

from .common import MIB

CADENCE = 0.005
LET_GO = "let go"
# Large pieces for the bulk of memory, small ones to follow what is used.
_BULK, _PIECE, _FOLLOWED = 64 * MIB, 4 * MIB, 512 * MIB
_SET_PDEATHSIG, _SIGKILL, _MCL_CURRENT = 1, 9, 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class Memory(NamedTuple):
    """The machine's memory in bytes: what is free, what processes have, what files have."""

    free: int
    anonymous: int
    files: int


def excess(free: int, used: int, limit: int, reserve: int) -> int:
    """The bytes to take, or, negative, to give back, so that `limit` bytes can be used. Pure.

    The kernel evicts when less than `reserve` is free. At the limit nothing is given back.
    """
    beyond = free + used - limit - reserve
    return beyond if beyond > 0 or used < limit else 0


class Balloon:
    """Locked memory, in pieces."""

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []
        self.bytes = 0

    def take(self, size: int) -> None:
        """Lock about `size` bytes more. Raises `OSError` where the system does not let us."""
        while size >= _PIECE:
            length = _BULK if size >= _FOLLOWED else _PIECE
            piece = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(piece))
            if _LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)):
                raise OSError(ctypes.get_errno(), "memory cannot be locked: root may")
            self._pieces.append(piece)
            self.bytes += length
            size -= length

    def give_back(self, size: int) -> None:
        """Give back up to `size` bytes, what was locked last first."""
        while self._pieces and size >= len(self._pieces[-1]):
            piece = self._pieces.pop()
            self.bytes -= len(piece)
            size -= len(piece)
            piece.close()


def memory() -> Memory:
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0]) * 1024
    files = found["Active(file)"] + found["Inactive(file)"]
    return Memory(found["MemFree"], found["AnonPages"], files)


def reserve() -> int:
    """The free bytes below which the kernel begins to evict: each zone's, and what it protects."""
    pages = 0
    for zone in Path("/proc/zoneinfo").read_text().split("Node ")[1:]:
        fields = dict(line.split(maxsplit=1) for line in zone.splitlines() if len(line.split()) > 1)
        protected = (int(one) for one in fields["protection:"].strip("()").split(","))
        pages += min(int(fields["managed"]), int(fields["low"]) + max(protected))
    return pages * mmap.PAGESIZE


def main() -> None:
    # Ends with the benchmark, is the first to be ended, and must not wait for pages of its own.
    _LIBC.prctl(_SET_PDEATHSIG, _SIGKILL)
    Path("/proc/self/oom_score_adj").write_text("1000")
    limit = int(sys.stdin.readline())
    before, kept, balloon = memory().anonymous, reserve(), Balloon()
    _LIBC.mlockall(_MCL_CURRENT)
    holding, most = False, 0
    while True:
        now = memory()
        # What others gave back since must not be theirs who are measured.
        before = min(before, now.anonymous - balloon.bytes)
        processes = now.anonymous - balloon.bytes - before
        used = processes + now.files
        beyond = excess(now.free, used, limit, kept)
        if processes > limit:
            balloon.give_back(balloon.bytes)
            print(LET_GO, flush=True)
            return
        if beyond > 0:
            balloon.take(min(beyond, _FOLLOWED))
        else:
            balloon.give_back(-beyond)
        if holding:
            most = max(most, used)
        elif beyond < _PIECE:
            holding = True
            print("held", flush=True)
        if select.select([sys.stdin], [], [], 0 if beyond > _BULK else CADENCE)[0]:
            print(most, flush=True)
            return


if __name__ == "__main__":
    main()
