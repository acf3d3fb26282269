"""How to read what is missing: a pure plan.

Small shards that lie beside each other in one file and are wanted at once become one read
into several slots; large ones are read by several threads. No I/O here: `pager.py` decides
what is missing, `shard_reader.py` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .layers import BLOCK


class Extent(Protocol):
    """A range of a file: a `Shard` of the manifest is one."""

    @property
    def file(self) -> str:
        """The file's path in the package."""

    @property
    def offset(self) -> int:
        """The first byte."""

    @property
    def bytes(self) -> int:
        """How many bytes there are."""


# Experts from this size on are worth waking a thread for. It starts 15 to 40 us after it was
# asked to (measured, thread asleep for 0.5 to 10 ms); reading so much takes 60 us from the page
# cache, 250 us from the disk.
_THREAD_BYTES = 256 * 1024
# As much is read at once where shards are small: the disk is at full speed from here on.
GROUP_BYTES = 1 << 20
# Large experts of a chunk that are on their way while one runs.
AHEAD = 2
# Between two shards of a pool lie the zero bytes up to the next block, and never more.
MOST_GAP = BLOCK - 1
# preadv takes 1,024 buffers; a gap needs one of its own.
MOST_SHARDS = 512


def reads_in_threads(size: int) -> bool:
    """Whether experts of `size` bytes are read by threads beside the one that needs them."""
    return size >= _THREAD_BYTES


def plan_batches(experts: Sequence[int], size: int, slots: int) -> list[Sequence[int]]:
    """Cut a chunk's experts of `size` bytes into those acquired together, in their order.

    Small ones come together as far as one read takes them, in a quarter of the slots at most
    so that other requests find room beside them; large ones come one by one.
    """
    count = 1 if reads_in_threads(size) else max(1, min(GROUP_BYTES // size, slots // 4))
    return [experts[begin : begin + count] for begin in range(0, len(experts), count)]


def plan_reads(extents: Sequence[Extent], most_bytes: int = GROUP_BYTES) -> list[list[int]]:
    """Group `extents`, which do not overlap; each group, of positions in it, is one read.

    A group lies in one file, in ascending order, with gaps of at most `MOST_GAP` bytes, and
    is `most_bytes` long at most unless it is a single extent. Groups come in the order of
    their first extents, so that what is wanted first is read first.
    """
    groups: list[list[int]] = []
    for at in sorted(range(len(extents)), key=lambda at: (extents[at].file, extents[at].offset)):
        if groups and _continues(extents, groups[-1], at, most_bytes):
            groups[-1].append(at)
        else:
            groups.append([at])
    groups.sort(key=min)
    return groups


def _continues(extents: Sequence[Extent], group: list[int], at: int, most_bytes: int) -> bool:
    first, last, extent = extents[group[0]], extents[group[-1]], extents[at]
    return (
        len(group) < MOST_SHARDS
        and last.file == extent.file
        and extent.offset - (last.offset + last.bytes) <= MOST_GAP
        and extent.offset + extent.bytes - first.offset <= most_bytes
    )
