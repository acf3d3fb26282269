"""Importing a Hugging Face checkpoint of a billion parameters: memory and speed, and running it.

The checkpoint is random and of OLMoE's form.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .common import (
    Report,
    Table,
    Target,
    folder_bytes,
    fresh,
    peak_bytes,
    resident_bytes,
    run,
)
from .hf_models import write_checkpoint

LARGE = {
    "vocabulary": 50304, "width": 1024, "layers": 12, "heads": 16,
    "experts": 32, "top_k": 4, "hidden": 1024,
}  # fmt: skip
SMALL = {
    "vocabulary": 640, "width": 64, "layers": 2, "heads": 4,
    "experts": 8, "top_k": 2, "hidden": 128,
}  # fmt: skip
ALLOWED = 500 * 10**6
PROMPT, NEW_TOKENS = 64, 64


def measure(quick: bool) -> Report:
    dims = SMALL if quick else LARGE
    with tempfile.TemporaryDirectory() as folder:
        source, package = Path(folder) / "checkpoint", Path(folder) / "package"
        parameters = fresh(write_checkpoint, folder=source, dims=dims, form="olmoe", dtype="bf16")
        made = fresh(convert, source=source, package=package)
        size = folder_bytes(source)
        ran = {
            budget: fresh(generate, package=package, budget=budget, threads=2)
            for budget in ("25%", "100%")
        }
    beyond = max(made["peak"], made["proof"]) - made["trunk"] - made["expert"]
    return Report(
        [
            Table(
                f"Importing {parameters / 1e9:.2f} billion parameters, bfloat16",
                [
                    "",
                    "checkpoint, MB",
                    "seconds",
                    "MB/s",
                    "trunk, MB",
                    "peak RSS, MB",
                    "of the comparing process",
                    "beyond, at most",
                ],
                [
                    [
                        "import",
                        size / 1e6,
                        made["seconds"],
                        size / made["seconds"] / 1e6,
                        made["trunk"] / 1e6,
                        made["peak"] / 1e6,
                        made["proof"] / 1e6,
                        beyond / 1e6,
                    ]
                ],
            ),
            Table(
                "Memory when a stage begins, and at the end",
                ["stage", "seconds", "RSS, MB", "peak so far, MB"],
                [
                    [name, seconds, now / 1e6, peak / 1e6]
                    for name, seconds, now, peak in made["stages"]
                ],
            ),
            Table(
                f"Running it, {PROMPT}-token prompt and {NEW_TOKENS} tokens, 2 threads",
                ["budget", "tokens/s", "first token, s", "hit rate", "peak RSS, MB"],
                [
                    [
                        f"{budget} of the experts ({one['plan']})",
                        one["speed"],
                        one["first"],
                        one["hits"],
                        one["peak"] / 1e6,
                    ]
                    for budget, one in ran.items()
                ],
            ),
        ],
        [
            Target(
                "memory of an import",
                "at most the trunk as stored + one expert + 500 MB",
                f"{beyond / 1e6:.0f} MB beyond the trunk and one expert",
                beyond <= ALLOWED,
            ),
            Target(
                "a quarter of its size",
                "runs in a quarter of the experts' memory",
                f"{ran['25%']['speed']:.1f} tokens/s, {ran['25%']['peak'] / 1e6:.0f} MB",
                ran["25%"]["speed"] > 0,
            ),
        ],
    )


def convert(source: str, package: str) -> dict[str, Any]:
    """Import it in this process: seconds, and memory stage by stage."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from evermind_exporters.huggingface.import_ import import_checkpoint
    from evermind_manifests.package import open_package

    stages: list[tuple[str, float, int, int]] = []
    started = time.perf_counter()

    def tell(name: str) -> None:
        passed = time.perf_counter() - started
        stages.append((name, passed, resident_bytes(), peak_bytes()))

    import_checkpoint(Path(source), Path(package), stage=tell)
    tell("done")
    with open_package(Path(package)) as opened:
        manifest = opened.manifest
        assert manifest.resident is not None
        return {
            "seconds": stages[-1][1],
            "stages": stages,
            "peak": stages[-1][3],
            # The package is compared with transformers in a process of its own.
            "proof": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "trunk": manifest.files[manifest.resident].bytes,
            "expert": max(shard.bytes for shard in manifest.shards),
        }


def generate(package: str, budget: str, threads: int) -> dict[str, Any]:
    """Run it in this process with a share of its experts in memory."""
    import evermind_runtime as em

    warnings.simplefilter("ignore", em.PagingWarning)
    prompt = np.random.default_rng(1).integers(0, 500, PROMPT).tolist()
    with em.load(package, budget=budget, plan="paged", threads=threads) as model:
        times = [time.perf_counter()]
        for _ in model.generate(prompt, max_new_tokens=NEW_TOKENS, stop_tokens=[]):
            times.append(time.perf_counter())
        return {
            "speed": (len(times) - 2) / (times[-1] - times[1]),
            "first": times[1] - times[0],
            "hits": model.stats().hit_rate,
            "peak": peak_bytes(),
            "plan": model.plan.name,
        }


if __name__ == "__main__":
    run(measure)
