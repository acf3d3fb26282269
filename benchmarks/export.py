"""Writing a package: bytes per second beside a plain sequential write, and peak memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from .common import (
    MIB,
    Cell,
    Report,
    Table,
    Target,
    folder_bytes,
    fresh,
    median,
    peak_bytes,
    ratio,
    resident_bytes,
    run,
)
from .models import language_model, package

VARIANTS = [("f16", "files"), ("f16", "pool"), ("bf16", "files"), ("f32", "files")]
_BLOCK = 4 * MIB


def measure(quick: bool) -> Report:
    dims = (
        {"width": 256, "hidden": 1024, "layers": 2, "experts": 4}
        if quick
        else {"width": 2048, "hidden": 4096, "layers": 2, "experts": 8}
    )
    rounds = 1 if quick else 5
    rows: list[list[Cell]] = []
    speeds, peaks = {}, []
    for dtype, layout in VARIANTS[: 1 if quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            found = fresh(
                write, folder=folder, dims=dims, dtype=dtype, layout=layout, rounds=rounds
            )
        size = found["bytes"]
        share = speeds[f"{dtype} {layout}"] = ratio(found["plain"], found["export"])
        peaks.append(found["beyond"] - found["largest"])
        rows.append(
            [
                f"{dtype}, {layout}",
                size / 1e6,
                size / median(found["export"]) / 1e6,
                size / median(found["plain"]) / 1e6,
                share,
                found["largest"] / MIB,
                found["beyond"] / MIB,
            ]
        )
    columns = [
        "experts",
        "MB",
        "export, MB/s",
        "plain write, MB/s",
        "share",
        "largest tensor, MiB",
        "memory beyond the model, MiB",
    ]
    slowest = min(speeds, key=lambda name: speeds[name])
    return Report(
        [Table(f"Export, synced, medians of {rounds} interleaved rounds", columns, rows)],
        [
            Target(
                "export",
                "at least 60 % of the disk's sequential write rate",
                f"{speeds[slowest]:.0%} at worst ({slowest})",
                speeds[slowest] >= 0.6,
            ),
            Target(
                "memory of an export",
                "at most the largest tensor + 300 MiB beyond the model",
                f"largest tensor {max(peaks) / MIB:+.0f} MiB at worst",
                max(peaks) <= 300 * MIB,
            ),
        ],
    )


def write(folder: str, dims: dict[str, int], dtype: str, layout: str, rounds: int) -> dict:
    """Seconds of exports and of plain writes of as many bytes, in turn; memory beyond the model."""
    source = language_model(vocab=256, top_k=2, **dims)
    held = resident_bytes()
    destination, plain = Path(folder) / "package", Path(folder) / "plain"
    seconds: dict[str, list[float]] = {"export": [], "plain": []}
    size = 0
    for _ in range(rounds):
        started = time.perf_counter()
        package(source, destination, dtype=dtype, layout=layout)
        seconds["export"].append(time.perf_counter() - started)
        size = folder_bytes(destination)
        shutil.rmtree(destination)
        started = time.perf_counter()
        _write_plainly(plain, size)
        seconds["plain"].append(time.perf_counter() - started)
        plain.unlink()
    return {
        **seconds,
        "bytes": size,
        "beyond": peak_bytes() - held,
        "largest": max(tensor.nbytes for tensor in source.tensors.values()),
    }


def _write_plainly(path: Path, size: int) -> None:
    block = os.urandom(_BLOCK)
    with path.open("wb", buffering=0) as file:
        for begin in range(0, size, _BLOCK):
            file.write(memoryview(block)[: min(_BLOCK, size - begin)])
        os.fsync(file.fileno())


if __name__ == "__main__":
    run(measure)
