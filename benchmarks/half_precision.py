"""Resident experts in half precision against float32 ones: the same speed at half the bytes?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import evermind_runtime as em

from .common import (
    MIB,
    Cell,
    Report,
    Seconds,
    Table,
    Target,
    fresh,
    interleaved,
    median,
    ratio,
    run,
)

DTYPES = ("f32", "f16", "bf16")
DIMS: dict[str, dict[str, int]] = {
    "128 -> 256": {"width": 128, "hidden": 256, "layers": 4, "experts": 16},
    "512 -> 1024": {"width": 512, "hidden": 1024, "layers": 4, "experts": 16},
    "1024 -> 3584": {"width": 1024, "hidden": 3584, "layers": 2, "experts": 8},
}


def measure(quick: bool) -> Report:
    from .models import language_model, package

    new_tokens, rounds = (4, 1) if quick else (64, 7)
    rows: list[list[Cell]] = []
    shares = {}
    for name, dims in list(DIMS.items())[: 1 if quick else None]:
        source = language_model(top_k=2, **dims)
        size = 2 * dims["width"] * dims["hidden"] * 4 / MIB
        with tempfile.TemporaryDirectory() as folder:
            for dtype in DTYPES:
                package(source, Path(folder) / dtype, dtype=dtype)
            for threads in (1, 2):
                seconds: Seconds = fresh(
                    decode, threads=threads, folder=folder, new_tokens=new_tokens, rounds=rounds
                )
                speeds = {dtype: new_tokens / median(seconds[dtype]) for dtype in DTYPES}
                against = {dtype: ratio(seconds["f32"], seconds[dtype]) for dtype in DTYPES[1:]}
                shares |= {(name, threads, dtype): share for dtype, share in against.items()}
                rows.append(
                    [
                        f"{name}, {size:.2g} MiB as f32, {threads} thread{'s' * (threads > 1)}",
                        *speeds.values(),
                        *against.values(),
                    ]
                )
    columns = ["experts", *(f"{dtype}, tokens/s" for dtype in DTYPES), "f16 / f32", "bf16 / f32"]
    f16 = {name: share for (name, threads, dtype), share in shares.items()
           if threads == 1 and dtype == "f16"}  # fmt: skip
    return Report(
        [Table(f"All experts resident, {new_tokens} new tokens", columns, rows)],
        [
            Target(
                "resident f16 against f32 experts, one thread",
                "at least 95 % of the speed at half the bytes",
                ", ".join(f"{share:.0%} ({name})" for name, share in f16.items()),
                min(f16.values()) >= 0.95,
            )
        ],
    )


def decode(threads: int, folder: str, new_tokens: int, rounds: int) -> Seconds:
    """Seconds of generating, the dtypes in turn."""
    models = {
        dtype: em.load(Path(folder) / dtype, threads=threads, plan="half") for dtype in DTYPES
    }

    def generate(model: em.Model) -> None:
        list(model.generate([1, 2, 3], max_new_tokens=new_tokens, temperature=1.0))

    sides = {dtype: (lambda model=model: generate(model)) for dtype, model in models.items()}
    return interleaved(sides, rounds)


if __name__ == "__main__":
    run(measure)
