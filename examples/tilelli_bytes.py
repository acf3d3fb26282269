"""Train a ternary byte model on text files, package it packed, and compare with half precision.

python examples/tilelli_bytes.py [--steps N] README.md [more files…]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import evermind_runtime as em
from evermind_exporters import ExportOptions, export_package, read_source
from evermind_manifests import open_package

from evermind_pack.parity import parity_reference
from evermind_pack.training import (
    LanguagePlan,
    LmTrainerOptions,
    StepReport,
    build_corpus,
    read_documents,
    train_language_model,
)

# Five pathways of two banks; every token takes the best three of the ten units.
CONFIG = {
    "d_model": 96,
    "n_layers": 2,
    "d_head": 24,
    "pathways": 5,
    "wide_kernel_size": 11,
    "n_banks": 2,
    "top_k_routing": 3,
}


def report(step: StepReport) -> None:
    if step.step % 20 == 0:
        print(f"step {step.step}: loss {step.loss:.2f}")


def main(paths: list[Path], steps: int) -> None:
    corpus = build_corpus(read_documents(paths), vocab_size=256)
    options = LmTrainerOptions(lr=1e-2, warmup_steps=min(10, steps - 1), max_grad_norm=1.0)
    plan = LanguagePlan(steps=steps, batch_size=4, window=48)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train_language_model(run, corpus, CONFIG, options, plan, family="tilelli", on_step=report)
        source = read_source(run)
        sizes = {}
        for dtype in ("ternary", "f16"):
            package = Path(folder) / f"{dtype}.zip"
            options_of = ExportOptions(dtype=dtype)
            export_package(source, package, options_of, reference=parity_reference("tilelli"))
            with open_package(package) as opened:
                sizes[dtype] = sum(shard.bytes for shard in opened.manifest.shards)
        with em.load(Path(folder) / "ternary.zip", budget="60%") as model:
            print("---")
            for piece in model.generate("The ", max_new_tokens=120, temperature=0.5, seed=2):
                print(piece.text, end="", flush=True)
            stats = model.stats()
        ratio = sizes["f16"] / sizes["ternary"]
        print(f"\n---\nunits: {sizes['ternary']:,} bytes ternary, {ratio:.1f} times less than f16")
        print(f"{stats.hit_rate:.0%} hits with {stats.budget_bytes:,} bytes of units in memory")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(__file__)])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    main(arguments.paths, arguments.steps)
