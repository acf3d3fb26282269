"""The training loop of a run: steps, metrics, checkpoints, and a clean stop.

Batches are a pure function of the step number, so a run that was stopped and resumed is the
same, bit for bit, as one that was not (on CPU, with the same number of threads).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from evermind_manifests.errors import EvermindPackError

from .run_folder import RunFolder, require_resumable
from .run_lock import run_lock
from .trainer import StepReport, Trainer

BatchT = TypeVar("BatchT")


class DivergedError(EvermindPackError, ArithmeticError):
    """The loss is no longer a finite number; the run's last checkpoint is from before."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Where a run stands: `step` of `steps` are done, and checkpointed in `folder`."""

    folder: Path
    step: int
    steps: int

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    @property
    def summary(self) -> str:
        """One line for a person: what is there, and how to go on."""
        if self.finished:
            return f"{self.folder}: step {self.step} of {self.steps} done"
        return (
            f"{self.folder}: stopped after step {self.step} of {self.steps}; "
            f"resume with: evermind-pack train --resume {self.folder}"
        )


def run_training(
    run: RunFolder,
    trainer: Trainer[Any, Any, BatchT],
    batch_of: Callable[[int], BatchT],
    *,
    steps: int,
    plan: Mapping[str, Any],
    checkpoint_every: int = 100,
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = 100,
    on_step: Callable[[StepReport], None] | None = None,
    stop: threading.Event | None = None,
) -> TrainingResult:
    """Train up to step `steps`, from wherever `trainer` stands, and leave a checkpoint.

    `batch_of(n)` gives the batch of step n (from 1). `evaluate` measures a validation loss
    every `evaluate_every` steps and at the end. Setting `stop` ends the loop after the
    current step; `stop_on_interrupt` sets one on Ctrl-C. Raises `DivergedError` when the loss
    is not finite, and before the first step as `require_resumable` and `run_lock` do.
    """
    require_resumable(trainer)
    with run_lock(run.path):
        run.tidy(trainer.steps)
        while trainer.steps < steps and not (stop is not None and stop.is_set()):
            report = trainer.step(batch_of(trainer.steps + 1))
            if not math.isfinite(report.loss) or not math.isfinite(report.grad_norm):
                raise DivergedError(
                    f"{run.path}: step {report.step}: loss {report.loss}, gradient norm "
                    f"{report.grad_norm}",
                    hint="Start again with a lower learning rate, or with max_grad_norm set.",
                )
            last = report.step == steps
            if evaluate is not None and (last or report.step % evaluate_every == 0):
                report = replace(report, validation_loss=evaluate())
            run.log({key: value for key, value in asdict(report).items() if value is not None})
            if last or report.step % checkpoint_every == 0:
                run.save(trainer, plan)
            if on_step is not None:
                on_step(report)
        run.save(trainer, plan)
    return TrainingResult(run.path, trainer.steps, steps)
