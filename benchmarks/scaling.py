"""Decoding speed as experts per layer and layers grow: what grows with the model and what not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import evermind_runtime as em

from .common import MIB, Cell, Report, Table, Target, fresh, interleaved, median, run
from .cores import round_trip_ns

EXPERTS = (8, 16, 32, 64, 128, 256, 512)
LAYERS = (2, 4, 8, 16, 32, 64)
# 0.25 MiB an expert; two for each token and layer, as everywhere.
DIMS = {"width": 256, "hidden": 256, "top_k": 2}
_BAR = 20


def measure(quick: bool) -> Report:
    new_tokens, rounds = (4, 1) if quick else (64, 5)
    sweeps: dict[str, list[tuple[int, dict[str, int]]]] = {
        "experts per layer": [(n, {"layers": 4, "experts": n}) for n in EXPERTS],
        "layers": [(n, {"layers": n, "experts": 16}) for n in LAYERS],
    }
    tables, targets = [], []
    for what, points in sweeps.items():
        found = [
            (n, _measured({**DIMS, **dims}, new_tokens, rounds))
            for n, dims in (points[:1] if quick else points)
        ]
        rates = [one["rate"] for _, one in found]
        rows: list[list[Cell]] = [
            [
                str(n),
                one["all"] / MIB,
                one["active"] / MIB,
                one["speed"],
                one["rate"] / 1e9,
                "#" * round(_BAR * one["rate"] / max(rates)),
                one["shared"],
                one["apart"],
            ]
            for n, one in found
        ]
        columns = [what, "experts, MiB", "active, MiB a token", "tokens/s", "active GB/s", "curve",
                   "tokens/s with 2 threads", "core to core around them, ns"]  # fmt: skip
        plans = "/".join(sorted({one["plan"] for _, one in found}))
        threads = "/".join(sorted({str(one["threads"]) for _, one in found}))
        title = f"All resident (plan {plans}, threads {threads}), {new_tokens} new tokens"
        tables.append(Table(title, columns, rows))
        spread = min(rates) / max(rates)
        targets.append(
            Target(
                f"tokens/s per active byte, {found[0][0]} to {found[-1][0]} {what}",
                "flat (within 25 %)",
                f"slowest {spread:.0%} of the fastest",
                spread >= 0.75,
            )
        )
    return Report(tables, targets)


def decode(
    path: str, new_tokens: int, rounds: int, compute_threads: int | None = None
) -> dict[str, Any]:
    """Tokens/s, and the weights one token passes through, in bytes."""
    with em.load(path, threads=compute_threads) as model:

        def generate() -> None:
            list(model.generate([1, 2, 3], max_new_tokens=new_tokens, temperature=1.0))

        speed = new_tokens / median(interleaved({"": generate}, rounds)[""])
        manifest = model.manifest
        size = manifest.kinds[manifest.layers[0].kind].bytes
        routed = sum(layer.top_k * size for layer in manifest.layers)
        resident = manifest.files[manifest.resident].bytes if manifest.resident else 0
        return {
            "speed": speed,
            "plan": model.plan.name,
            "threads": model.threads,
            "all": sum(layer.experts * size for layer in manifest.layers),
            "active": routed + resident,
            "rate": speed * (routed + resident),
        }


def plot(report: Report, path: Path) -> None:
    """Active bytes per second over both sweeps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(report.tables), figsize=(9, 3.5), sharey=True)
    for axis, table in zip(axes, report.tables, strict=True):
        axis.plot([row[0] for row in table.rows], [row[4] for row in table.rows], marker="o")
        axis.set_xlabel(table.columns[0])
    axes[0].set_ylabel("active GB/s")
    axes[0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path)


def _measured(dims: dict[str, int], new_tokens: int, rounds: int) -> dict[str, Any]:
    from .models import language_model, package

    with tempfile.TemporaryDirectory() as folder:
        path = package(language_model(**dims), Path(folder) / "package")
        how = {"path": path, "new_tokens": new_tokens, "rounds": rounds}
        result: dict[str, Any] = fresh(decode, **how)
        before = round_trip_ns()
        result["shared"] = fresh(decode, **how, compute_threads=2)["speed"]
        after = round_trip_ns()
        result["apart"] = before and after and f"{before:.0f}, {after:.0f}"
        return result


if __name__ == "__main__":
    run(measure, plot=plot)
