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
    LimbicBatch,
    LimbicTrainer,
    LimbicTrainerOptions,
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
from ..training.presets import LanguagePreset, python_demo
from ..training.run_folder import AnyTrainer, clear_start
from .arrays import read_arrays
from .terminal import remark
from .training_progress import training_progress

_STEPS = 400
_CHECKPOINT_EVERY = 100


def start_job(args: argparse.Namespace, *, stop: threading.Event) -> TrainingResult:
    """Begin the run that the arguments of `train` describe."""
    quiet = args.quiet or args.json
    if args.family == "lm":
        if args.stdlib == bool(args.corpus):
            raise InputError("lm needs a corpus: --corpus PATH …, or --stdlib")
        _refuse(args, "data")
        for path in args.corpus or ():
            if not path.exists():
                raise InputError(f"--corpus: {path}: there is no such folder or file")
        return train_lm(args.output, _language_preset(args), stop=stop, quiet=quiet)
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


def train_lm(
    folder: Path, preset: LanguagePreset, *, stop: threading.Event, quiet: bool
) -> TrainingResult:
    """Gather the preset's corpus and train on it with a progress bar.

    The files are those of `preset.plan.source`, or the standard library's if it names none;
    the plan remembers them for a resumed run.
    """
    source = {
        "paths": preset.plan.source.get("paths", []),
        "vocab_size": preset.vocab_size,
        "max_bytes": preset.corpus_bytes,
    }
    plan = dataclasses.replace(preset.plan, source=source)
    clear_start(folder)  # refused before the corpus is gathered, not after
    corpus = _corpus(source, quiet)
    with training_progress(plan.steps, quiet=quiet) as on_step:
        return train_language_model(
            folder, corpus, preset.config, preset.options, plan, on_step=on_step, stop=stop
        )


def _language_preset(args: argparse.Namespace) -> LanguagePreset:
    """The demo's settings, with what the arguments say instead."""
    base = python_demo(args.steps or python_demo().plan.steps)
    config = _given(
        dModel=args.d_model,
        numLayers=args.layers,
        convKernel=args.conv,
        hiddenDim=args.hidden,
        numExperts=args.experts,
        topK=args.top_k,
        seed=args.seed,
    )
    plan = _given(batch_size=args.batch, window=args.window, seed=args.seed)
    source = {"paths": [str(path.resolve()) for path in args.corpus or ()]}
    return dataclasses.replace(
        base,
        config=base.config | config,
        options=dataclasses.replace(base.options, **_given(lr=args.lr, aux_weight=args.aux_weight)),
        plan=dataclasses.replace(base.plan, source=source, **plan),
        **_given(vocab_size=args.vocab, corpus_bytes=args.max_bytes),
    )


def _corpus(source: Mapping[str, Any], quiet: bool) -> Corpus:
    limits: dict[str, Any] = {"max_bytes": source["max_bytes"]}
    paths = [Path(path) for path in source["paths"]]
    if not paths:
        preset = python_demo()
        paths = [standard_library()]
        limits |= {"suffixes": preset.suffixes, "skip_folders": preset.skip_folders}
    documents = read_documents(paths, **limits)
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
    for name in names:
        array = arrays[name]
        if array.dtype.kind not in "fiu":
            raise InputError(f"{path}: {name}: expected numbers, found {array.dtype}")
        # Of the right rank before all, so that x, the first, has a length to compare with.
        right = array.ndim == (1 if name == "reward" else 2) and array.size > 0
        if not right or len(array) != len(arrays["x"]):
            raise InputError(f"{path}: {name}: found shape {array.shape}, which does not fit")
    return {name: arrays[name] for name in names}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:  # by identity: a 0 that was given counts
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} has no meaning when training {args.family}")
