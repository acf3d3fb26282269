"""Experts of up to 404 MB: peak memory of writing a Tokitai model, and of running it with two."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import evermind_runtime as em
import numpy as np

from .common import MIB, Cell, Report, Table, Target, fresh, peak_bytes, run

# Beside 1.5 experts when writing, and beside the two that are held when running.
WRITING, RUNNING = 300_000_000, 100 * MIB
ROWS = 64


def measure(quick: bool) -> Report:
    writing: list[list[Cell]] = []
    running: list[list[Cell]] = []
    written, ran = [], []
    for size in ("nano",) if quick else ("tiny", "medium", "full"):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / size)
            seconds, peak, expert, total = fresh(write, size=size, path=path)
            written.append(peak - 1.5 * expert)
            writing.append([size, total / 1e6, expert / 1e6, peak / 1e6, seconds])
            first, each, peak, read = fresh(classify, path=path, budget=2 * expert)
            ran.append(peak - 2 * expert)
            running.append([size, 2 * expert / 1e6, peak / 1e6, first, each, read / expert])
    return Report(
        [
            Table(
                "`export tokitai-moe:SIZE` in f16, weights drawn as they are needed",
                ["size", "package, MB", "an expert, MB", "peak RSS, MB", "seconds"],
                writing,
            ),
            Table(
                f"{ROWS} rows with a budget of two experts",
                [
                    "size",
                    "budget, MB",
                    "peak RSS, MB",
                    "first row alone, s",
                    f"{ROWS} rows at once, s",
                    "experts read",
                ],
                running,
            ),
        ],
        [
            Target(
                "peak RSS of an export",
                "below 1.5 experts + 300 MB",
                f"1.5 experts {max(written) / 1e6:+.0f} MB at worst",
                max(written) < WRITING,
            ),
            Target(
                "peak RSS of a run with two experts",
                "at most these + 100 MiB",
                f"{max(ran) / MIB:+.0f} MiB at worst",
                max(ran) <= RUNNING,
            ),
        ],
    )


def write(size: str, path: str) -> tuple[float, int, int, int]:
    """(seconds, peak of this process, bytes of an expert, bytes of the package)."""
    from evermind_pack.cli import main

    started = time.perf_counter()
    code = main(["export", f"tokitai-moe:{size}", "-o", path, "-q", "--json"])
    assert code == 0, f"export ended with {code}"
    seconds, peak = time.perf_counter() - started, peak_bytes()
    with em.load(path, budget="50%") as model:
        manifest = model.manifest
    (kind,) = manifest.kinds.values()
    return seconds, peak, kind.bytes, sum(file.bytes for file in manifest.files.values())


def classify(path: str, budget: int) -> tuple[float, float, int, int]:
    """(seconds of the first row, of all rows, peak of this process, bytes of experts read)."""
    x = np.random.default_rng(0).standard_normal((ROWS, 96), dtype=np.float32)
    with em.load(path, budget=budget) as model:
        started = time.perf_counter()
        model.forward({"x": x[:1]}, steps="decode")
        first = time.perf_counter()
        model.forward({"x": x})
        return first - started, time.perf_counter() - first, peak_bytes(), model.stats().bytes_read


if __name__ == "__main__":
    run(measure)
