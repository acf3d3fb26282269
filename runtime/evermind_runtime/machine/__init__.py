"""What this machine gives a paged model: measured in about a second for each figure."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..choose_threads import check_threads
from ..onnx_runtime import usable_cores
from .disk import (
    DISK_HOW,
    DiskHow,
    DiskRates,
    Extent,
    drop_pages,
    file_extents,
    measure_disk,
    shard_extents,
    temporary_extents,
)
from .memory import AvailableMemory, available_memory
from .processor import call_seconds, matmul_rate, memory_rate, sha256_rate

__all__ = [
    "AvailableMemory",
    "DiskRates",
    "Extent",
    "Machine",
    "available_memory",
    "drop_pages",
    "file_extents",
    "measure_machine",
    "shard_extents",
]

# Of the available memory, what reading memory may take: a small machine must survive it.
_MEASURED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates in bytes (`matmul_rate`: float32 operations) per second; memory in bytes.

    `disk_rate` is for reads of `block` bytes, `readers` at a time, read as `disk_how` says and
    at `disk_where`; `cached_rate` for what the page cache holds. `memory_rate` and
    `matmul_rate` are those of `threads` threads together, `sha256_rate` that of one, and
    `call_seconds` is what one small numpy call takes. `available` is `None` where the machine
    does not tell.
    """

    disk_rate: float
    disk_how: DiskHow
    disk_where: str
    cached_rate: float
    block: int
    readers: int
    memory_rate: float
    matmul_rate: float
    sha256_rate: float
    call_seconds: float
    threads: int
    available: AvailableMemory | None

    @property
    def disk_note(self) -> str:
        """How `disk_rate` came about, in words."""
        return DISK_HOW[self.disk_how]

    def with_disk_rate(self, rate: float) -> Machine:
        """The same machine with another disk, of this many bytes per second."""
        return replace(self, disk_rate=rate, disk_how="given")

    def warm(self) -> Machine:
        """The same machine for a package that lies in its page cache."""
        return replace(self, disk_rate=self.cached_rate, disk_how="warm")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"disk_note": self.disk_note}


def measure_machine(
    extents: Sequence[Extent],
    folder: str | os.PathLike[str],
    *,
    block: int,
    working_set: int,
    threads: int | None = None,
    seconds: float = 2.0,
) -> Machine:
    """Measure for about `seconds`; takes at most 256 MiB of memory (and a quarter of what is
    available), and of each kind of reads.

    The disk is measured over `extents`, or if there are none over a temporary file in
    `folder` in blocks of `block` bytes (in the system's temporary folder where that cannot be
    written, which `disk_where` then says). `working_set` is how much memory the model's
    weights take, `threads` how many compute (default: all usable cores). Raises `OSError`
    where nothing can be read or written, `DeviceError` for threads that `load` would refuse.
    """
    cores = usable_cores()
    check_threads(threads, cores)
    count = threads or cores
    available = available_memory()
    if available is not None:
        working_set = min(working_set, int(available.bytes * _MEASURED_SHARE))
    if extents:
        where, disk = "the package's own files", measure_disk(extents, seconds=seconds / 2)
    else:
        where, disk = _measure_beside(folder, block, seconds / 2)
    return Machine(
        disk_rate=disk.rate,
        disk_how=disk.how,
        disk_where=where,
        cached_rate=disk.cached_rate,
        block=disk.block,
        readers=disk.readers,
        memory_rate=memory_rate(count, working_set, seconds=seconds / 5),
        matmul_rate=matmul_rate(count, seconds=seconds / 5),
        sha256_rate=sha256_rate(seconds=seconds / 10),
        call_seconds=call_seconds(seconds=seconds / 20),
        threads=count,
        available=available,
    )


def _measure_beside(
    folder: str | os.PathLike[str], block: int, seconds: float
) -> tuple[str, DiskRates]:
    try:
        with temporary_extents(folder, block) as extents:
            return f"a temporary file in {os.fspath(folder)}", measure_disk(
                extents, seconds=seconds
            )
    except OSError:
        # A read-only place: say where the figure is from instead.
        other = tempfile.gettempdir()
        with temporary_extents(other, block) as extents:
            return f"a temporary file in {other}", measure_disk(extents, seconds=seconds)
