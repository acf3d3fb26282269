"""What every benchmark shares: how it is run, how it is timed, and what it reports.

A benchmark is a module with a function `measure(quick) -> Report`. Run one with
`python -m benchmarks.NAME [--quick] [--json]`, or all with `python -m benchmarks`.

Sides that are compared are timed in interleaved rounds of one process, so that a busy
machine slows them alike; figures are medians, ratios medians of the rounds' ratios. What
needs a process of its own (a thread count, a peak of memory) runs in a fresh one. There a
function runs whose memory may be measured: what only others need they import themselves.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Cell: TypeAlias = str | int | float | None
Seconds: TypeAlias = dict[str, list[float]]

ROOT = Path(__file__).parent.parent
MIB = 2**20


@dataclass(frozen=True)
class Table:
    """Rows of one measurement; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Target:
    """What was asked for and what came out; `met` is what the figures say, nothing else."""

    what: str
    wanted: str
    found: str
    met: bool


@dataclass(frozen=True)
class Report:
    tables: list[Table]
    targets: list[Target] = field(default_factory=list)


def run(
    measure: Callable[[bool], Report], *, plot: Callable[[Report, Path], None] | None = None
) -> None:
    """The command line of one benchmark; `plot` draws its report into a file."""
    import argparse

    summary = (sys.modules[measure.__module__].__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--quick", action="store_true", help="few rounds of small models: a check")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    if plot:
        parser.add_argument(
            "--plot", type=Path, metavar="FILE", help="draw the curves (.png, .svg)"
        )
    options = parser.parse_args()
    report = measure(options.quick)
    if plot and options.plot:
        plot(report, options.plot)
    print(json.dumps(asdict(report)) if options.json else as_text(report))


def report_of(data: Mapping[str, Any]) -> Report:
    """The report that `--json` printed."""
    tables = [Table(**table) for table in data["tables"]]
    return Report(tables, [Target(**target) for target in data["targets"]])


def fresh(
    function: Callable[..., Any],
    /,
    *,
    threads: int | None = None,
    begun: Callable[[int], None] | None = None,
    **arguments: Any,
) -> Any:
    """What a benchmark's function returns (as JSON) when a new process calls it.

    `threads` bounds what numpy may use there; ONNX Runtime's threads are the function's. `begun`
    hears the process's id when it starts.
    """
    import subprocess

    program = (
        f"import json, sys; from {_module(function)} import {function.__name__} as call; "
        "print(json.dumps(call(**json.loads(sys.argv[1]))))"
    )
    if threads:
        arguments["threads"] = threads
    command = [sys.executable, "-c", program, json.dumps(arguments, default=str)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(threads), stdout=subprocess.PIPE, text=True
    ) as process:
        if begun:
            begun(process.pid)
        output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(output.splitlines()[-1])


def environment(threads: int | None) -> dict[str, str]:
    """For a process that imports what this one can; `threads` bounds what numpy may use in it."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if threads:
        variables |= {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "OMP", "MKL")}
    return variables


def interleaved(
    sides: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: bool = True
) -> Seconds:
    """Seconds of every call: each side once a round, in turn."""
    if warm_up:
        for side in sides.values():
            side()
    seconds: Seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: list[float]) -> float:
    import statistics

    return statistics.median(values)


def ratio(one: list[float], other: list[float]) -> float:
    """The median over rounds of `one / other`."""
    return median([a / b for a, b in zip(one, other, strict=True)])


def peak_bytes() -> int:
    """The most memory this process ever held (VmHWM)."""
    return _status("VmHWM:")


def resident_bytes() -> int:
    """The memory this process holds now (VmRSS)."""
    return _status("VmRSS:")


def own_bytes(process: int | str = "self") -> int:
    """The memory a process holds now that is no file's (RssAnon): it cannot be evicted."""
    return _status("RssAnon:", process)


def reserved_bytes() -> int:
    """What this process could write to without asking, used or not (VmData)."""
    return _status("VmData:")


def drop_cached(paths: Sequence[Path]) -> bool:
    """Have the page cache forget these files; whether it did, but for a hundredth at most."""
    from evermind_runtime.machine import Extent, drop_pages

    whole = [Extent(partial(os.open, path), 0, path.stat().st_size) for path in paths]
    return drop_pages(whole) and cached_bytes(paths) <= sum(one.bytes for one in whole) // 100


def cached_bytes(paths: Iterable[Path]) -> int:
    """What the page cache has of these files."""
    from evermind_runtime.machine import page_cache

    total = 0
    for path in paths:
        with path.open("rb") as file:
            total += page_cache.cached_bytes(file.fileno(), 0, path.stat().st_size) or 0
    return total


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_below(folder))


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def random_values(shape: tuple[int, ...], seed: int, scale: float) -> np.ndarray:
    """Normal float32 values, quickly made: a large array repeats 4 Mi of them."""
    size = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(min(size, 1 << 22), dtype=np.float32) * np.float32(scale)
    return np.resize(drawn, shape)


def machine() -> list[tuple[str, str]]:
    """What a reader needs to place the figures."""
    import platform
    from importlib.metadata import version

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    # What follows its version names who built a kernel, or who hosts it.
    kernel = platform.release().partition("-")[0]
    load = os.getloadavg()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "numpy", "onnx"))
    return [
        ("processor", f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory"),
        ("system", f"Linux {kernel}, Python {platform.python_version()}, {packages}"),
        ("load before the run", f"{load:.2f}"),
    ]


def as_text(report: Report) -> str:
    lines: list[str] = []
    for table in report.tables:
        cells = [table.columns, *([shown(cell) for cell in row] for row in table.rows)]
        widths = [max(len(row[at]) for row in cells) for at in range(len(table.columns))]
        lines += ["", table.title]
        for row in cells:
            first, *others = (
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  " + "  ".join([first, *others]).rstrip())
    for target in report.targets:
        verdict = "met" if target.met else "MISSED"
        lines += ["", f"{verdict}: {target.what}: {target.found} (wanted: {target.wanted})"]
    return "\n".join(lines).strip("\n")


def as_markdown(report: Report) -> str:
    blocks: list[str] = []
    for table in report.tables:
        lines = [f"{table.title}:", "", _row(table.columns)]
        lines.append("|" + " --- |" + " ---: |" * (len(table.columns) - 1))
        lines += [_row([shown(cell) for cell in row]) for row in table.rows]
        blocks.append("\n".join(lines))
    if report.targets:
        lines = [_row(["target", "wanted", "found", ""]), "|" + " --- |" * 4]
        lines += [
            _row([item.what, item.wanted, item.found, "met" if item.met else "**missed**"])
            for item in report.targets
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _module(function: Callable[..., Any]) -> str:
    """Its importable name, also when the module was started with `-m`."""
    if function.__module__ != "__main__":
        return function.__module__
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run benchmarks with `python -m benchmarks.NAME`"
    return spec.name


def _status(field_name: str, process: int | str = "self") -> int:
    words = Path(f"/proc/{process}/status").read_text().split()
    return int(words[words.index(field_name) + 1]) * 1024
