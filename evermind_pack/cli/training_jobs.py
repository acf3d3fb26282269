"""From a command's arguments to a training run, and from a run folder back to its data."""

from __future__ import annotations

import argparse
import dataclasses
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from evermind_exporters.families.tokitai import SIZES
from evermind_manifests.errors import InputError

from ..models import FamilyModel, LimbicModel, SharedExpertMoE, TokitaiMoE
from ..training import (
    Corpus,
    LimbicBatch,
    LimbicTrainer,
    LimbicTrainerOptions,
    MoeBatch,
    MoeTrainer,
    MoeTrainerOptions,
    RunFolder,
    TokitaiBatch,
    TokitaiTrainer,
    TokitaiTrainerOptions,
    TrainingResult,
    build_corpus,
    read_documents,
    resume_language_model,
    rule_batch,
    run_training,
    standard_library,
    train_language_model,
)
from ..training.presets import LanguagePreset, atome_bytes, python_demo, synapse_demo
from ..training.run_folder import AnyTrainer, clear_start
from ..training.run_lock import run_lock
from .arrays import read_arrays
from .terminal import counted, remark
from .training_progress import training_progress

_STEPS = 400
_RULE_BATCH = 256
_HELD_OUT = 1000
_CHECKPOINT_EVERY = 100
_TEXT = ("corpus", "stdlib", "vocab", "max_bytes", "layers", "d_model", "conv", "window")
# What each trains on, by family: arrays of a sample file, and the batch made of them.
_SAMPLES: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    SharedExpertMoE.family: (("x", "target"), MoeBatch),
    LimbicModel.family: (("x", "state", "delta", "reward"), LimbicBatch),
    TokitaiMoE.family: (("x", "label"), TokitaiBatch),
}
_VECTORS = ("reward", "label")
_PRESETS: dict[str, Callable[..., LanguagePreset]] = {
    "lm": python_demo,
    "synapse": synapse_demo,
    "atome": atome_bytes,
}
# Options of `train` and what the families' configurations call them.
_CONFIG_NAMES = {
    "lm": {
        "d_model": "dModel",
        "layers": "numLayers",
        "conv": "convKernel",
        "hidden": "hiddenDim",
        "experts": "numExperts",
        "top_k": "topK",
        "seed": "seed",
    },
    "synapse": {
        "d_model": "d_model",
        "layers": "n_layers",
        "hidden": "d_expert",
        "experts": "n_experts",
        "top_k": "top_k",
        "seed": "seed",
    },
    "atome": {
        "d_model": "d_model",
        "layers": "n_layers",
        "conv": "kernel_size",
        "top_k": "top_k",
        "pathways": "pathways",
        "banks": "n_banks",
        "top_k_routing": "top_k_routing",
        "seed": "seed",
    },
}
_ATOME = ("pathways", "banks", "top_k_routing")


def start_job(args: argparse.Namespace, *, stop: threading.Event) -> TrainingResult:
    """Begin the run that the arguments of `train` describe."""
    with run_lock(args.output):
        return _start(args, stop=stop)


def _start(args: argparse.Namespace, *, stop: threading.Event) -> TrainingResult:
    quiet = args.quiet or args.json
    if args.family != "atome":
        _refuse(args, *_ATOME)
    if args.family in _PRESETS:
        if args.stdlib == bool(args.corpus):
            raise InputError(f"{args.family} needs a corpus: --corpus PATH …, or --stdlib")
        _refuse(args, "data", "size", "depth")
        if args.family == "synapse":
            _refuse(args, "conv")
        if args.family == "atome":
            _refuse(args, "experts", "hidden")
        for path in args.corpus or ():
            if not path.exists():
                raise InputError(f"--corpus: {path}: there is no such folder or file")
        return train_lm(args.output, _language_preset(args), stop=stop, quiet=quiet)
    _refuse(args, *_TEXT)
    if args.family == "tokitai":
        return _start_tokitai(args, stop=stop, quiet=quiet)
    _refuse(args, "size", "depth")
    if args.data is None:
        raise InputError(f"{args.family} needs --data NPZ")
    return _start_samples(args, stop=stop, quiet=quiet)


def resume_job(folder: Path, *, stop: threading.Event, quiet: bool) -> TrainingResult:
    """Go on with a run, its data gathered again from where they were."""
    run = RunFolder.open(folder)
    with run_lock(folder):
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
    with run_lock(folder):
        clear_start(folder)  # refused before the corpus is gathered, not after
        corpus = _corpus(source, quiet)
        with training_progress(plan.steps, quiet=quiet) as on_step:
            return train_language_model(
                folder,
                corpus,
                preset.config,
                preset.options,
                plan,
                family=preset.family,
                on_step=on_step,
                stop=stop,
            )


def _language_preset(args: argparse.Namespace) -> LanguagePreset:
    """The family's demo settings, with what the arguments say instead."""
    demo = _PRESETS[args.family]
    base = demo(args.steps or demo().plan.steps)
    names = _CONFIG_NAMES[args.family]
    config = {
        names[option]: value for option in names if (value := getattr(args, option)) is not None
    }
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
        f"corpus: {counted(len(documents), 'file')}, {len(corpus.train):,} tokens, "
        f"vocabulary {corpus.vocab_size:,}",
        quiet=quiet,
    )
    return corpus


def _start_samples(
    args: argparse.Namespace, *, stop: threading.Event, quiet: bool
) -> TrainingResult:
    trainer: AnyTrainer
    if args.family == "moe":
        arrays = _samples(args.data, SharedExpertMoE)
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
        arrays = _samples(args.data, LimbicModel)
        config = _given(
            inputDim=arrays["x"].shape[1],
            hiddenDim=args.hidden,
            stateDim=arrays["state"].shape[1],
            seed=args.seed,
        )
        trainer = LimbicTrainer(LimbicModel(config), LimbicTrainerOptions(**_given(lr=args.lr)))
    plan = _plan(args, batch_size=args.batch or 0)
    run = RunFolder.create(args.output, trainer.model)
    return _train_samples(run, trainer, plan, stop=stop, quiet=quiet)


def _start_tokitai(
    args: argparse.Namespace, *, stop: threading.Event, quiet: bool
) -> TrainingResult:
    """On a file of samples, or on the built-in rule, whose batches are made step by step."""
    hidden, depth = (None, None) if args.size else SIZES["nano"]
    config = _given(
        module="moe",
        size=args.size,
        hidden=hidden if args.hidden is None else args.hidden,
        depth=depth if args.depth is None else args.depth,
        n_experts=args.experts,
        top_k=args.top_k,
        seed=args.seed,
    )
    plan = _plan(args, batch_size=args.batch or (0 if args.data else _RULE_BATCH))
    if args.data:
        config["in_dim"] = _samples(args.data, TokitaiMoE)["x"].shape[1]
    else:
        plan["rule_seed"] = args.seed or 0
    clear_start(args.output)  # refused before the weights are drawn, not after
    given = _given(lr=args.lr, aux_weight=args.aux_weight)
    options = TokitaiTrainerOptions(
        schedule="cosine",
        warmup_steps=min(10, plan["steps"] - 1),
        total_steps=plan["steps"],
        **given,
    )
    trainer = TokitaiTrainer(TokitaiMoE(config), options)
    run = RunFolder.create(args.output, trainer.model)
    return _train_samples(run, trainer, plan, stop=stop, quiet=quiet)


def _plan(args: argparse.Namespace, *, batch_size: int) -> dict[str, Any]:
    return {
        "steps": args.steps or _STEPS,
        "batch_size": batch_size,
        "data": str(args.data.resolve()) if args.data else None,
    }


def _train_samples(
    run: RunFolder,
    trainer: AnyTrainer,
    plan: Mapping[str, Any],
    *,
    stop: threading.Event,
    quiet: bool,
) -> TrainingResult:
    steps = plan["steps"]
    with training_progress(steps, done=trainer.steps, unit="samples", quiet=quiet) as on_step:
        return run_training(
            run,
            trainer,
            _batches(type(trainer.model), trainer.model.config, plan),
            steps=steps,
            plan=plan,
            checkpoint_every=_CHECKPOINT_EVERY,
            evaluate=_evaluation(trainer, plan),
            on_step=on_step,
            stop=stop,
        )


def _evaluation(trainer: AnyTrainer, plan: Mapping[str, Any]) -> Callable[[], float] | None:
    """The loss on samples of the built-in rule that no step trains on."""
    if plan["data"] is not None:
        return None
    assert isinstance(trainer, TokitaiTrainer)
    held_out = rule_batch(trainer.model.config, _HELD_OUT, plan["rule_seed"], 0)
    return partial(trainer.evaluate, held_out)


def _batches(
    model: type[FamilyModel], config: Mapping[str, Any], plan: Mapping[str, Any]
) -> Callable[[int], Any]:
    """The batch of each step: a pure function of its number."""
    size = plan["batch_size"]
    if plan["data"] is None:
        return partial(rule_batch, config, size, plan["rule_seed"])
    arrays = _samples(Path(plan["data"]), model)
    count = len(arrays["x"])
    size = min(size or count, count)
    _, batch = _SAMPLES[model.family]

    def batch_of(step: int) -> Any:
        # Slices in order, wrapping round.
        rows = (np.arange(size) + (step - 1) * size) % count
        return batch(**{name: array[rows] for name, array in arrays.items()})

    return batch_of


def _samples(path: Path, model: type[FamilyModel]) -> dict[str, Any]:
    names, _ = _SAMPLES[model.family]
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
        right = array.ndim == (1 if name in _VECTORS else 2) and array.size > 0
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
