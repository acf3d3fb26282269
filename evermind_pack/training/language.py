"""Train a language model on a corpus, in a run folder that can be resumed and exported."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evermind_manifests.errors import CheckpointError, ConfigError

from ..models import MODELS, AtomeLmModel, EvermindLM, LanguageModel
from .atome_trainer import AtomeTrainer
from .corpus import Corpus, stream_windows
from .lm_trainer import LmBatch, LmTrainer, LmTrainerOptions
from .loop import TrainingResult, run_training
from .run_folder import RunFolder
from .run_lock import run_lock
from .trainer import StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguagePlan:
    """How long and on what windows to train. `seed` decides which windows, not the weights.

    A batch is `batch_size` windows of `window` predicted tokens each. `source` is whatever
    the caller needs to gather the corpus again (JSON values); it is kept in the run.
    """

    steps: int
    batch_size: int = 16
    window: int = 128
    seed: int = 0
    checkpoint_every: int = 100
    evaluate_every: int = 100
    evaluate_batches: int = 4
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "window", "checkpoint_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"plan: {name}: expected 1 or more, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"plan: seed: expected 0 to 2^64 - 1, found {self.seed}")


def train_language_model(
    folder: Path,
    corpus: Corpus,
    config: Mapping[str, Any],
    options: LmTrainerOptions,
    plan: LanguagePlan,
    *,
    family: str = EvermindLM.family,
    on_step: Callable[[StepReport], None] | None = None,
    stop: threading.Event | None = None,
) -> TrainingResult:
    """Start a run in a new folder. `config` is the model's; its vocabulary is the corpus's.

    Raises `ConfigError` for a `family` that is no language model's.
    """
    models = MODELS.get(family, {})
    kinds = [models] if isinstance(models, type) else list(models.values())
    kind = next((kind for kind in kinds if issubclass(kind, LanguageModel)), None)
    if kind is None:
        raise ConfigError(f"family: expected a language model's, found {family!r}")
    model = kind.with_vocabulary(config, corpus.vocab_size)
    with run_lock(folder):
        run = RunFolder.create(folder, model, corpus.tokenizer)
        trainer = AtomeTrainer if isinstance(model, AtomeLmModel) else LmTrainer
        return _train(run, trainer(model, options), corpus, plan, on_step, stop)


def resume_language_model(
    folder: Path,
    corpus: Corpus,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    stop: threading.Event | None = None,
) -> TrainingResult:
    """Go on from a run's newest checkpoint, to the same end as if it had never stopped.

    Raises `MissingFileError` without a checkpoint, `CheckpointError` when the run is not a
    language model's, `ConfigError` when `corpus` is not the run's own.
    """
    run = RunFolder.open(folder)
    trainer = run.restore()
    if not isinstance(trainer, LmTrainer):
        raise CheckpointError(
            f"{folder}: family: expected a language model's, found {trainer.model.family!r}"
        )
    plan, digest = _read_plan(run)
    if digest != corpus.sha256:
        raise ConfigError(
            f"{folder}: the corpus is not the one this run began with",
            hint="Gather it from the same files with the same options.",
        )
    return _train(run, trainer, corpus, plan, on_step, stop)


def language_plan(folder: Path) -> LanguagePlan:
    """The plan of a run to resume, for its `source`."""
    plan, _ = _read_plan(RunFolder.open(folder))
    return plan


def _read_plan(run: RunFolder) -> tuple[LanguagePlan, str]:
    """The plan and the corpus's digest, as `_train` gave them to the checkpoint."""
    record = run.plan()
    try:
        digest = str(record.pop("corpus"))
        return LanguagePlan(**record), digest
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run.latest()}: not a language model's plan: {error}") from error


def _train(
    run: RunFolder,
    trainer: LmTrainer,
    corpus: Corpus,
    plan: LanguagePlan,
    on_step: Callable[[StepReport], None] | None,
    stop: threading.Event | None,
) -> TrainingResult:
    def batch_of(step: int) -> LmBatch:
        return stream_windows(
            corpus.train,
            seed=plan.seed,
            step=step,
            batch_size=plan.batch_size,
            window=plan.window,
        )

    # The same validation windows every time; a short corpus may have none.
    measured = len(corpus.validation) > plan.window and plan.evaluate_batches > 0

    def evaluate() -> float:
        return trainer.evaluate(
            stream_windows(
                corpus.validation,
                seed=plan.seed,
                step=number,
                batch_size=plan.batch_size,
                window=plan.window,
            )
            for number in range(plan.evaluate_batches)
        )

    return run_training(
        run,
        trainer,
        batch_of,
        steps=plan.steps,
        plan={**asdict(plan), "corpus": corpus.sha256},
        checkpoint_every=plan.checkpoint_every,
        evaluate=evaluate if measured else None,
        evaluate_every=plan.evaluate_every,
        on_step=on_step,
        stop=stop,
    )
