"""Peak memory of a process that generates under a budget, beyond its resident part and budget."""

from __future__ import annotations

import warnings
from pathlib import Path

import evermind_runtime as em

from .common import MIB, Cell, Report, Table, Target, fresh, peak_bytes, run

ALLOWED = 80 * MIB
DIMS = {
    "128 -> 256, L4 E16": {"width": 128, "layers": 4, "experts": 16, "hidden": 256},
    "256 -> 1024, L4 E16": {"width": 256, "layers": 4, "experts": 16, "hidden": 1024},
    "1024 -> 4096, L2 E8": {"width": 1024, "layers": 2, "experts": 8, "hidden": 4096},
}
PROMPT, NEW_TOKENS = 300, 40


def measure(quick: bool) -> Report:
    # Not for the processes that are measured: they only run packages.
    import tempfile

    from .models import language_model, package

    rows: list[list[Cell]] = []
    beyond = []
    for name, dims in list(DIMS.items())[: 1 if quick else None]:
        source = language_model(top_k=2, **dims)
        for dtype in ("f16",) if quick else ("f32", "f16", "bf16"):
            with tempfile.TemporaryDirectory() as folder:
                path = package(source, Path(folder) / "package", dtype=dtype)
                for budget in ("25%", "50%", None):
                    peak, resident, held, plan = fresh(generate, path=path, budget=budget)
                    beyond.append(peak - resident - held)
                    rows.append(
                        [
                            f"{name} {dtype}, {budget or 'all'} ({plan})",
                            resident / MIB,
                            held / MIB,
                            peak / MIB,
                            beyond[-1] / MIB,
                        ]
                    )
    columns = ["experts, budget", "resident part", "budget or pools", "peak RSS", "beyond both"]
    return Report(
        [Table(f"Peak memory, {PROMPT}-token prompt and {NEW_TOKENS} tokens, MiB", columns, rows)],
        [
            Target(
                "process RSS",
                "at most resident part + budget + 80 MiB",
                f"+ {max(beyond) / MIB:.0f} MiB at worst",
                max(beyond) <= ALLOWED,
            )
        ],
    )


def generate(path: str, budget: str | None) -> tuple[int, int, int, str]:
    """(peak of this process, the package's resident part, the budget) in bytes, and the plan."""
    warnings.simplefilter("ignore", em.PagingWarning)
    with em.load(path, budget=budget) as model:
        list(model.generate(range(PROMPT), max_new_tokens=NEW_TOKENS, temperature=1.0))
        manifest = model.manifest
        resident = manifest.files[manifest.resident].bytes if manifest.resident else 0
        return peak_bytes(), resident, model.budget, model.plan.name


if __name__ == "__main__":
    run(measure)
