"""A prompt of 512 tokens with a quarter of the experts, against all of them resident."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np

from .common import Cell, Report, Table, Target, fresh, interleaved, median, ratio, run

TOKENS = 512
DIMS: dict[str, dict[str, int]] = {
    "128 -> 256, L4 E16": {"width": 128, "layers": 4, "experts": 16, "hidden": 256},
    "512 -> 2048, L4 E16": {"width": 512, "layers": 4, "experts": 16, "hidden": 2048},
}


def measure(quick: bool) -> Report:
    from .models import language_model, package

    rounds = 1 if quick else 9
    rows: list[list[Cell]] = []
    shares, reads = {}, []
    for name, dims in list(DIMS.items())[: 1 if quick else None]:
        source = language_model(top_k=2, **dims)
        for dtype in ("f16",) if quick else ("f32", "f16"):
            with tempfile.TemporaryDirectory() as folder:
                path = package(source, Path(folder) / "package", dtype=dtype)
                found = fresh(prompt, path=path, rounds=rounds)
            whole, quarter = found["seconds"]["100%"], found["seconds"]["25%"]
            shares[f"{name} {dtype}"] = ratio(whole, quarter)
            reads.append(found["reads"] / found["used"])
            rows.append(
                [
                    f"{name} {dtype}",
                    TOKENS / median(whole),
                    TOKENS / median(quarter),
                    shares[f"{name} {dtype}"],
                    found["threads"],
                    found["used"],
                    found["reads"],
                ]
            )
    columns = [
        "experts",
        "all resident, tokens/s",
        "25 %, tokens/s",
        "share",
        "threads",
        "experts used",
        "read in one chunk",
    ]
    worst = min(shares, key=lambda name: shares[name])
    return Report(
        [Table(f"Prefill of {TOKENS} tokens in one chunk, page cache warm", columns, rows)],
        [
            Target(
                "prefill, reads",
                "each expert at most once per chunk",
                f"{max(reads):.2f} times at most",
                max(reads) <= 1,
            ),
            Target(
                "prefill with 25 % of the experts",
                "at least 70 % of all resident",
                f"{shares[worst]:.0%} at worst ({worst})",
                shares[worst] >= 0.7,
            ),
        ],
    )


def prompt(path: str, rounds: int) -> dict[str, Any]:
    """Seconds of the same chunk with all and a quarter of the experts; both give the same."""
    warnings.simplefilter("ignore", em.PagingWarning)
    tokens = {"tokens": np.random.default_rng(0).integers(0, 1024, TOKENS)}
    with em.load(path, plan="half") as whole, em.load(path, budget="25%") as quarter:
        expected, found = whole.forward(tokens), quarter.forward(tokens)
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
        layers = len(whole.manifest.layers)
        used = sum(len(np.unique(expected[f"ids.{layer}"])) for layer in range(layers))
        # Not misses: what was read ahead in time is a hit.
        before = quarter.stats().bytes_read
        quarter.forward(tokens)
        reads = (quarter.stats().bytes_read - before) / quarter.manifest.shards[0].bytes
        sides = {
            "100%": lambda: whole.forward(tokens, outputs=["logits"]),
            "25%": lambda: quarter.forward(tokens, outputs=["logits"]),
        }
        seconds = interleaved(sides, rounds)
        return {"seconds": seconds, "used": used, "reads": reads, "threads": whole.threads}


if __name__ == "__main__":
    run(measure)
