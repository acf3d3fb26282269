"""Train a small Synapse model on text, package it, page it, and look inside.

python examples/synapse_language_model.py [--steps 200] [text files…]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import evermind_runtime as em
import torch
from evermind_exporters import export_package, read_source
from evermind_manifests.validate import validate
from evermind_runtime.parity import parity_problems

from evermind_pack.parity import parity_reference
from evermind_pack.training import (
    StepReport,
    build_corpus,
    read_documents,
    synapse_demo,
    train_language_model,
)


def report(step: StepReport) -> None:
    if step.step % 20 == 0:
        print(f"step {step.step}: loss {step.loss:.2f}, busiest expert {step.peak_load:.1f}x")


def main(paths: list[Path], steps: int) -> None:
    torch.set_num_threads(1)  # these matrices are too small to share
    preset = synapse_demo(steps)
    corpus = build_corpus(read_documents(paths), vocab_size=preset.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        run, package = Path(folder) / "run", Path(folder) / "package"
        train_language_model(
            run,
            corpus,
            preset.config,
            preset.options,
            preset.plan,
            family=preset.family,
            on_step=report,
        )
        source = read_source(run)
        export_package(source, package, reference=parity_reference(source.family))
        found = validate(package, deep=True, run=parity_problems)
        print(f"valid: {found.ok} (checked: {', '.join(found.levels)})")
        generate(package)


def generate(package: Path) -> None:
    """Stream with half of the experts in memory, and say what they did."""
    with em.load(package, budget="50%") as model:
        model.observe()
        print("---")
        for piece in model.generate("The ", max_new_tokens=120, temperature=0.5, seed=2):
            print(piece.text, end="", flush=True)
        seen, stats = model.introspect(), model.stats()
    print(f"\n---\n{stats.hit_rate:.0%} hits with {stats.budget_bytes:,} bytes of experts")
    for layer, router in zip(seen.layers, seen.routers, strict=True):
        expert, magnitude = layer.top_contributors[0]
        pathway, strength = next(iter(router.pathways.items()))
        print(
            f"layer {layer.layer}: balance {layer.load_balance:.2f}, expert {expert} contributes "
            f"most ({magnitude:.2f}), strongest pathway {pathway} ({strength:.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="text to learn (default: the docs)")
    parser.add_argument("--steps", type=int, default=200, help="updates to make (default: 200)")
    arguments = parser.parse_args()
    documents = Path(__file__).parent.parent / "docs"
    main(arguments.files or [documents], arguments.steps)
