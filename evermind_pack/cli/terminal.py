"""What commands share on the terminal: progress on stderr, results on stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from evermind_runtime.sizes import StateSizes
    from rich.progress import Progress as Bar

Progress: TypeAlias = Callable[[int, int], None]
Unit: TypeAlias = Literal["count", "bytes"]

# What a shell gives a command that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED: Final = 130


@contextlib.contextmanager
def progress(label: str, *, quiet: bool = False, unit: Unit = "count") -> Iterator[Progress]:
    """A bar on stderr fed by `(done, total)`; silent when quiet or not on a terminal."""
    bar = None if quiet else _bar(unit)
    if bar is None:
        yield lambda _done, _total: None
        return
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def stages(*, quiet: bool = False) -> Iterator[tuple[Callable[[str], None], Progress]]:
    """For long work in stages: name the next one; and tell `(done, total)` bytes of it.

    On a terminal one bar shows both; elsewhere each stage is a line on stderr.
    """
    bar = None if quiet else _bar("bytes")
    if bar is None:
        yield lambda text: remark(text, quiet=quiet), lambda _done, _total: None
        return
    with bar:
        task = bar.add_task("", total=None)

        def begin(text: str) -> None:
            nonlocal task
            bar.remove_task(task)
            task = bar.add_task(text, total=None)

        yield begin, lambda done, total: bar.update(task, completed=done, total=total)


def _bar(unit: Unit) -> Bar | None:
    """A bar with the time left, or, of what has no end yet, the time it took so far.

    None where stderr is no terminal, or rich is not installed.
    """
    if not sys.stderr.isatty():
        return None
    try:
        from rich import progress as rich
        from rich.console import Console, RenderableType
        from rich.text import Text
    except ImportError:
        return None

    class Counted(rich.ProgressColumn):
        """A column for work that is counted, and what stands there for other work."""

        def __init__(
            self, counted: rich.ProgressColumn, other: rich.ProgressColumn | None = None
        ) -> None:
            super().__init__()
            self._counted, self._other = counted, other

        def render(self, task: rich.Task) -> RenderableType:
            column = self._counted if task.total is not None else self._other
            return column.render(task) if column else Text("")

    counts: tuple[rich.ProgressColumn, ...] = (rich.MofNCompleteColumn(),)
    if unit == "bytes":
        counts = (rich.DownloadColumn(binary_units=True), rich.TransferSpeedColumn())
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        *(Counted(column) for column in counts),
        Counted(rich.TimeRemainingColumn(), rich.TimeElapsedColumn()),
    )
    # This stderr, and not what it is for a while when a library's reports are kept off it.
    return rich.Progress(*columns, console=Console(file=sys.stderr), transient=True)


def remark(text: str, *, quiet: bool = False) -> None:
    """A line for the person, on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value))


def print_table(rows: Mapping[str, str]) -> None:
    """Aligned `name  value` lines on stdout."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells on stdout, the first a head: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())


def counted(count: int, noun: str) -> str:
    """`1 thread`, `1,234 threads`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def human_bytes(count: int) -> str:
    """`12,345 bytes` up to a few KiB, then `1.5 MiB`."""
    if count < 10 * 1024:
        return f"{count:,} bytes"
    size = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def state_text(state: StateSizes) -> str:
    """What a sequence keeps: `2.0 KiB a token, at most 1.5 MiB in windows, up to 4,096 tokens`."""
    parts = []
    if state.fixed:
        parts.append(f"{human_bytes(state.fixed)} of fixed shape")
    if state.per_token:
        parts.append(f"{human_bytes(state.per_token)} a token")
    if state.windows:
        parts.append(f"at most {human_bytes(state.bounded)} in windows")
    if state.longest is not None:
        parts.append(f"up to {state.longest:,} tokens")
    return ", ".join(parts) or "none"


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(value: float) -> str:
    """`12 ms`, `3.4 s`."""
    return f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.1f} s"


def rate(value: float) -> str:
    """Bytes per second, as `1.2 GB/s`."""
    return f"{value / 1e9:,.2f} GB/s" if value >= 1e9 else f"{value / 1e6:,.1f} MB/s"


def let_threads_sleep() -> None:
    """Have OpenMP's threads wait without spinning; call before torch is imported.

    On two cores with one other busy process, a training step takes 0.26 s this way and 0.83 s
    with spinning threads.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def positive_int(text: str) -> int:
    """An argument's value that counts something: 1 or more."""
    # More digits than any count has would only make int() refuse in its own words.
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, found {text[:80]!r}")
    return value
