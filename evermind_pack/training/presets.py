"""Ready-made settings for language models: Evermind's, Synapse's and Atome."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .corpus import LIBRARY_TABLES, SKIPPED_FOLDERS, Corpus, build_corpus, read_documents
from .language import LanguagePlan
from .lm_trainer import LmTrainerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguagePreset:
    """Settings for a corpus (`corpus`) and for `train_language_model` (the rest)."""

    family: str
    corpus_bytes: int
    suffixes: tuple[str, ...]
    skip_folders: frozenset[str]
    vocab_size: int
    config: dict[str, Any]
    options: LmTrainerOptions
    plan: LanguagePlan

    def corpus(self, sources: Iterable[Path]) -> Corpus:
        """The corpus of these files and folders; see `read_documents` and `build_corpus`."""
        documents = read_documents(
            sources,
            suffixes=self.suffixes,
            skip_folders=self.skip_folders,
            max_bytes=self.corpus_bytes,
        )
        return build_corpus(documents, vocab_size=self.vocab_size)


def synapse_demo(steps: int = 400) -> LanguagePreset:
    """A small Synapse model of bytes, for `standard_library()`.

    Its recurrences run token by token in torch, hence the short windows. Gradients are clipped:
    the gates are exponentials.
    """
    return LanguagePreset(
        family="synapse",
        corpus_bytes=3_000_000,
        suffixes=(".py",),
        skip_folders=SKIPPED_FOLDERS | LIBRARY_TABLES,
        vocab_size=256,
        config={
            "d_model": 64,
            "n_layers": 2,
            "n_experts": 8,
            "top_k": 2,
            "d_expert": 128,
            "d_xlstm_hidden": 64,
            "n_xlstm_heads": 4,
            "n_memory_heads": 2,
            "d_memory": 16,
            "d_state": 8,
        },
        options=LmTrainerOptions(
            lr=0.002,
            beta2=0.99,
            weight_decay=0.01,
            schedule="cosine",
            warmup_steps=min(20, steps - 1),
            total_steps=steps,
            max_grad_norm=1.0,
            aux_weight=0.01,
        ),
        plan=LanguagePlan(steps=steps, batch_size=8, window=48),
    )


def python_demo(steps: int = 700) -> LanguagePreset:
    """4.6 million parameters, of which a token uses 0.9 million, for `standard_library()`.

    The balancing weight is five times the usual: at 0.01 two of 16 experts took everything in
    some layer for the first hundred steps, at 0 for good; at 0.05 the loss is the same.
    """
    return LanguagePreset(
        family="evermind-lm",
        corpus_bytes=3_000_000,
        suffixes=(".py",),
        skip_folders=SKIPPED_FOLDERS | LIBRARY_TABLES,
        vocab_size=1024,
        config={
            "dModel": 128,
            "numLayers": 4,
            "convKernel": 8,
            "hiddenDim": 256,
            "numExperts": 16,
            "topK": 2,
        },
        options=LmTrainerOptions(
            lr=0.006,
            beta2=0.99,
            weight_decay=0.1,
            schedule="cosine",
            warmup_steps=min(20, steps - 1),
            total_steps=steps,
            max_grad_norm=1.0,
            aux_weight=0.05,
        ),
        plan=LanguagePlan(steps=steps, batch_size=8, window=128),
    )


def atome_bytes(steps: int = 400) -> LanguagePreset:
    """The Atome model of the reference's defaults: 60,800 ternary parameters over bytes.

    Straight-through training wants a higher rate than float weights of this size do.
    """
    base = python_demo(steps)
    return replace(
        base,
        family="tilelli",
        vocab_size=256,
        config={"d_model": 64, "n_layers": 4, "d_head": 16, "top_k": 4},
        options=replace(base.options, lr=0.01, weight_decay=0.0, aux_weight=0.01),
    )
