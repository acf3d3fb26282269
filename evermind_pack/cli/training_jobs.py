"""From a command's arguments to a training run, and from a run folder back to its data."""

from __future__ import annotations

import argparse
import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evermind_manifests.errors import InputError

from ..models import LimbicModel, SharedExpertMoE
from ..training import (
    Corpus,
    LanguagePlan,
    LimbicBatch,
    LimbicTrainer,
    LimbicTrainerOptions,
    LmTrainerOptions,
    MoeBatch,
    MoeTrainer,
    MoeTrainerOptions,
    RunFolder,
    TrainingResult,
    build_corpus,
    read_documents,
    resume_language_model,
    run_training,
    standard_library,
    train_language_model,
)
from ..training.run_folder import AnyTrainer
from .arrays import read_arrays
from .terminal import remark
from .training_progress import training_progress

_STEPS = 400
_LM_BATCH = 16
_CHECKPOINT_EVERY = 100


def start_job(args: argparse.Namespace, *, stop: threading.Event) -> TrainingResult:
    """Begin the run that the arguments of `train` describe."""
    quiet = args.quiet or args.json
    if args.family == "lm":
        if args.stdlib == bool(args.corpus):
            raise InputError("lm needs a corpus: --corpus PATH …, or --stdlib")
        _refuse(args, "data")
        source = {
            "paths": [str(path.resolve()) for path in args.corpus or ()],
            "vocab_size": args.vocab or 1024,
            "max_bytes": args.max_bytes or 4_000_000,
        }
        config = _given(
            dModel=args.d_model or 128,
            numLayers=args.layers or 4,
            convKernel=args.conv or 8,
            hiddenDim=args.hidden or 256,
            numExperts=args.experts or 16,
            topK=args.top_k or 2,
            seed=args.seed,
        )
        options = language_options(args.steps or _STEPS)
        options = dataclasses.replace(options, **_given(lr=args.lr, aux_weight=args.aux_weight))
        plan = LanguagePlan(
            steps=args.steps or _STEPS,
            batch_size=args.batch or _LM_BATCH,
            window=args.window or 128,
            seed=args.seed or 0,
            checkpoint_every=_CHECKPOINT_EVERY,
            source=source,
        )
        return train_lm(args.output, config, options, plan, stop=stop, quiet=quiet)
    _refuse(args, "corpus", "stdlib", "vocab", "max_bytes", "layers", "d_model", "conv", "window")
    if args.data is None:
        raise InputError(f"{args.family} needs --data NPZ")
    return _start_samples(args, stop=stop, quiet=quiet)


def resume_job(folder: Path, *, stop: threading.Event, quiet: bool) -> TrainingResult:
    """Go on with a run, its data gathered again from where they were."""
    run = RunFolder.open(folder)
    plan = run.plan()
    trainer = run.restore()
    if "corpus" not in plan:
        return _train_samples(run, trainer, plan, stop=stop, quiet=quiet)
    corpus = _corpus(plan["source"], quiet)
    with training_progress(plan["steps"], done=trainer.steps, quiet=quiet) as on_step:
        return resume_language_model(folder, corpus, on_step=on_step, stop=stop)


def language_options(steps: int) -> LmTrainerOptions:
    """Settings that train a small language model well in a few hundred steps."""
    return LmTrainerOptions(
        lr=4e-3,
        schedule="cosine",
        warmup_steps=min(40, max(steps // 10, 1)),
        total_steps=max(steps, 2),
        max_grad_norm=1.0,
        weight_decay=0.01,
    )


def train_lm(
    folder: Path,
    config: Mapping[str, Any],
    options: LmTrainerOptions,
    plan: LanguagePlan,
    *,
    stop: threading.Event,
    quiet: bool,
) -> TrainingResult:
    """Gather the plan's corpus and train on it with a progress bar."""
    corpus = _corpus(plan.source, quiet)
    with training_progress(plan.steps, quiet=quiet) as on_step:
        return train_language_model(
            folder, corpus, config, options, plan, on_step=on_step, stop=stop
        )


def _corpus(source: Mapping[str, Any], quiet: bool) -> Corpus:
    paths = [Path(path) for path in source["paths"]] or [standard_library()]
    documents = read_documents(paths, max_bytes=source["max_bytes"])
    corpus = build_corpus(documents, vocab_size=source["vocab_size"])
    remark(
        f"corpus: {len(documents):,} files, {len(corpus.train):,} tokens, "
        f"vocabulary {corpus.vocab_size:,}",
        quiet=quiet,
    )
    return corpus


def _start_samples(
    args: argparse.Namespace, *, stop: threading.Event, quiet: bool
) -> TrainingResult:
    plan = {
        "steps": args.steps or _STEPS,
        "batch_size": args.batch or 0,
        "data": str(args.data.resolve()),
    }
    arrays = _samples(args.data, args.family)
    trainer: AnyTrainer
    if args.family == "moe":
        config = _given(
            modelDim=arrays["x"].shape[1],
            hiddenDim=args.hidden,
            numExperts=args.experts,
            topK=args.top_k,
            seed=args.seed,
        )
        given = _given(lr=args.lr, aux_weight=args.aux_weight)
        trainer = MoeTrainer(SharedExpertMoE(config), MoeTrainerOptions(**given))
    else:
        _refuse(args, "experts", "top_k", "aux_weight")
        config = _given(
            inputDim=arrays["x"].shape[1],
            hiddenDim=args.hidden,
            stateDim=arrays["state"].shape[1],
            seed=args.seed,
        )
        trainer = LimbicTrainer(LimbicModel(config), LimbicTrainerOptions(**_given(lr=args.lr)))
    run = RunFolder.create(args.output, trainer.model)
    return _train_samples(run, trainer, plan, stop=stop, quiet=quiet)


def _train_samples(
    run: RunFolder,
    trainer: AnyTrainer,
    plan: Mapping[str, Any],
    *,
    stop: threading.Event,
    quiet: bool,
) -> TrainingResult:
    moe = isinstance(trainer, MoeTrainer)
    arrays = _samples(Path(plan["data"]), "moe" if moe else "limbic")
    count = len(arrays["x"])
    size = min(plan["batch_size"] or count, count)

    def batch_of(step: int) -> MoeBatch | LimbicBatch:
        # Slices in order, wrapping round: a pure function of the step.
        rows = (np.arange(size) + (step - 1) * size) % count
        part = {name: array[rows] for name, array in arrays.items()}
        return MoeBatch(**part) if moe else LimbicBatch(**part)

    steps = plan["steps"]
    with training_progress(steps, done=trainer.steps, unit="samples", quiet=quiet) as on_step:
        return run_training(
            run,
            trainer,
            batch_of,
            steps=steps,
            plan=plan,
            checkpoint_every=_CHECKPOINT_EVERY,
            on_step=on_step,
            stop=stop,
        )


def _samples(path: Path, family: str) -> dict[str, Any]:
    names = ("x", "target") if family == "moe" else ("x", "state", "delta", "reward")
    arrays = read_arrays(path)
    if set(arrays) != set(names):
        raise InputError(
            f"{path}: expected the arrays {', '.join(names)}, found {', '.join(sorted(arrays))}"
        )
    for name, array in arrays.items():
        if array.ndim != (1 if name == "reward" else 2) or len(array) != len(arrays["x"]):
            raise InputError(f"{path}: {name}: found shape {array.shape}, which does not fit")
    return {name: arrays[name] for name in names}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} has no meaning when training {args.family}")
