"""Training on the terminal: a bar with the loss, or a line now and then where there is none."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from ..training import StepReport
from .terminal import remark

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def training_progress(
    steps: int, *, done: int = 0, unit: str = "tokens", quiet: bool = False
) -> Iterator[Callable[[StepReport], None]]:
    """A callback for a trainer's `on_step`; `done` steps were made in an earlier session."""
    if quiet:
        yield lambda _report: None
    elif sys.stderr.isatty():
        with _bar(steps, done, unit) as on_step:
            yield on_step
    else:
        yield _lines(steps, unit)


@contextlib.contextmanager
def _bar(steps: int, done: int, unit: str) -> Iterator[Callable[[StepReport], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    text = TextColumn("loss {task.fields[loss]}  {task.fields[speed]}")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), text, TimeLeft())
    meter = _Meter(unit)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, completed=done, loss="-", speed="")

        def on_step(report: StepReport) -> None:
            loss, speed = meter.update(report)
            bar.update(task, completed=report.step, loss=loss, speed=speed)

        yield on_step


def _lines(steps: int, unit: str) -> Callable[[StepReport], None]:
    meter = _Meter(unit)
    shown = time.monotonic()

    def on_step(report: StepReport) -> None:
        nonlocal shown
        loss, speed = meter.update(report)
        now = time.monotonic()
        if report.step == steps or now - shown >= _SECONDS_BETWEEN_LINES:
            shown = now
            remark(f"step {report.step}/{steps}  loss {loss}  {speed}")

    return on_step


class _Meter:
    """A smoothed loss and the speed since the start, as text."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._started = time.monotonic()
        self._items = 0
        self._loss: float | None = None
        self._validation = ""

    def update(self, report: StepReport) -> tuple[str, str]:
        self._items += report.items
        smooth = report.loss if self._loss is None else 0.9 * self._loss + 0.1 * report.loss
        self._loss = smooth
        if report.validation_loss is not None:
            self._validation = f" (validation {report.validation_loss:.3f})"
        speed = self._items / max(time.monotonic() - self._started, 1e-9)
        return f"{smooth:.3f}{self._validation}", f"{speed:,.0f} {self._unit}/s"
