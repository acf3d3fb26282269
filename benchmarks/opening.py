"""Opening a package of 20,000 shards, the first token, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import evermind_runtime as em

from .common import Cell, Report, Table, Target, fresh, interleaved, median, run
from .models import language_model, package

LAYERS, TOP_K = 5, 2
IMPORTS = {
    "import onnxruntime": "import onnxruntime",
    "import evermind_runtime": "import evermind_runtime",
    "both": "import onnxruntime, evermind_runtime",
    "evermind-pack --help": "from evermind_pack.cli import main; main([])",
}


def measure(quick: bool) -> Report:
    experts = 40 if quick else 4000
    rounds = 1 if quick else 7
    source = language_model(
        vocab=64, width=16, layers=LAYERS, experts=experts, top_k=TOP_K, hidden=16
    )
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("files", "pool"):
            path = package(source, Path(folder) / layout, layout=layout)
            opened = [fresh(open_and_start, path=path) for _ in range(rounds)]
            seconds, first = (median([run[at] for run in opened]) for at in (0, 1))
            rows.append([layout, seconds * 1000, first * 1000, opened[0][2], LAYERS * TOP_K])
    title = f"Opening {LAYERS * experts:,} shards, medians of {rounds} fresh processes"
    columns = ["layout", "load, ms", "first token, ms", "shards read", "shards routed to"]
    slowest = max(float(row[1] or 0) for row in rows)
    return Report(
        [Table(title, columns, rows), _imports(rounds)],
        [
            Target("open 20,000 shards", "at most 150 ms", f"{slowest:.0f} ms", slowest <= 150),
            Target(
                "what the first token reads",
                "only the shards it routes to",
                ", ".join(f"{row[3]:g} of {LAYERS * experts:,} ({row[0]})" for row in rows),
                all(row[3] == row[4] for row in rows),
            ),
        ],
    )


def open_and_start(path: str) -> tuple[float, float, float]:
    """Seconds to load (modules are imported before), seconds to the first token, shards read."""
    import onnxruntime  # noqa: F401

    started = time.perf_counter()
    with em.load(path, budget="25%") as model:
        opened = time.perf_counter()
        list(model.generate([1], max_new_tokens=1))
        seconds = time.perf_counter() - opened
        read = model.stats().bytes_read / model.manifest.shards[0].bytes
        return opened - started, seconds, read


def _imports(rounds: int) -> Table:
    def interpreter(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    seconds = interleaved(
        {
            name: lambda code=code: interpreter(code)
            for name, code in {"": "pass", **IMPORTS}.items()
        },
        rounds,
    )
    empty = median(seconds.pop(""))
    rows: list[list[Cell]] = [
        [name, (median(values) - empty) * 1000] for name, values in seconds.items()
    ]
    return Table("A fresh interpreter, beyond an empty one", ["", "ms"], rows)


if __name__ == "__main__":
    run(measure)
