"""Train a byte-level language model on text files, package it, stream under a small budget.

python examples/language_model.py README.md [more files…]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import evermind_runtime as em
from evermind_exporters import export_package, read_source

from evermind_pack.parity import parity_reference
from evermind_pack.training import (
    LanguagePlan,
    LmTrainerOptions,
    StepReport,
    build_corpus,
    read_documents,
    train_language_model,
)


def report(step: StepReport) -> None:
    if step.step % 20 == 0:
        print(f"step {step.step}: loss {step.loss:.2f}, busiest expert {step.peak_load:.1f}x")


def main(paths: list[Path]) -> None:
    corpus = build_corpus(read_documents(paths), vocab_size=256)
    config = {"dModel": 48, "numLayers": 3, "convKernel": 6, "numExperts": 8, "topK": 2}
    options = LmTrainerOptions(lr=5e-3, warmup_steps=10, max_grad_norm=1.0)
    plan = LanguagePlan(steps=80, batch_size=8, window=96)
    with tempfile.TemporaryDirectory() as folder:
        run, package = Path(folder) / "run", Path(folder) / "package.zip"
        train_language_model(run, corpus, config, options, plan, on_step=report)
        source = read_source(run)
        export_package(source, package, reference=parity_reference(source.family))
        with em.load(package, budget="40%") as model:
            print("---")
            for piece in model.generate("The ", max_new_tokens=200, temperature=0.5, seed=2):
                print(piece.text, end="", flush=True)
            stats = model.stats()
            print(f"\n---\n{stats.hit_rate:.0%} hits with {stats.budget_bytes:,} bytes of experts")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or [Path(__file__)])
