"""Generated text: shown as it comes, and its figures."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from evermind_runtime import Piece


@dataclass(frozen=True, slots=True)
class Generated:
    """What was made. The first token carries the prompt: it has a figure of its own."""

    tokens: list[int]
    text: str
    tokens_per_second: float
    ttft_ms: float

    def figures(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {
            "tokens": self.tokens,
            "text": self.text,
            "tokens_per_second": self.tokens_per_second,
            "ttft_ms": self.ttft_ms,
        }

    def speed(self) -> str:
        """The figures in a line."""
        return f"{self.tokens_per_second:,.1f} tokens/s, first after {self.ttft_ms:.1f} ms"


def follow(
    pieces: Iterator[Piece],
    show: Callable[[Piece], str] | None,
    stopped: Callable[[], bool] = lambda: False,
) -> Generated:
    """Read all pieces, or those until `stopped`; print what `show` gives of each, if it is set."""
    tokens: list[int] = []
    texts: list[str] = []
    first = started = time.perf_counter()
    for piece in pieces:
        if not tokens:
            first = time.perf_counter()
        tokens.append(piece.token)
        texts.append(piece.text)
        if show:
            print(show(piece), end="", flush=True)
        if stopped():
            break
    ended = time.perf_counter()
    speed = (len(tokens) - 1) / (ended - first) if len(tokens) > 1 else 0.0
    return Generated(tokens, "".join(texts), speed, (first - started) * 1000)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While it lasts, a first Ctrl-C is only noted, for the token to be finished; gives whether
    there was one. A second is a `KeyboardInterrupt`, as ever."""
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            signal.default_int_handler(number, frame)
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
