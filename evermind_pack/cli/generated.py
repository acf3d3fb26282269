"""Generated text: shown as it comes, and its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from evermind_manifests.errors import EvermindPackError
from evermind_runtime import Finish, Piece

from .terminal import counted

_ENDINGS: dict[Finish, str] = {
    "stop": "the last of them a stop token",
    "length": "as many as --max-new allows",
    "context": "which fill the model's context",
}


@dataclass(frozen=True, slots=True)
class Generated:
    """What was made. The first token carries the prompt: it has a figure of its own."""

    tokens: list[int]
    text: str
    tokens_per_second: float
    ttft_ms: float
    #: Why there are no more tokens; None where it was broken off.
    finish: Finish | None

    def figures(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {
            "tokens": self.tokens,
            "text": self.text,
            "finish": self.finish,
            "tokens_per_second": self.tokens_per_second,
            "ttft_ms": self.ttft_ms,
        }

    def speed(self) -> str:
        """The figures in a line."""
        return f"{self.tokens_per_second:,.1f} tokens/s, first after {self.ttft_ms:.1f} ms"

    def ended(self) -> str:
        """How many tokens there are, and why no more."""
        why = "broken off" if self.finish is None else _ENDINGS[self.finish]
        return f"{counted(len(self.tokens), 'token')}, {why}"


def follow(
    pieces: Iterator[Piece],
    show: Callable[[Piece], str] | None,
    stopped: Callable[[], bool] = lambda: False,
    *,
    begun: bool = False,
) -> Generated:
    """Read all pieces, or those until `stopped`; print what `show` gives of each, if it is set.

    What breaks off ends the line, if it was `begun` before or something of it was shown.
    """
    tokens: list[int] = []
    texts: list[str] = []
    finish: Finish | None = "length"  # where none is asked for
    first = started = time.perf_counter()
    try:
        for piece in pieces:
            if not tokens:
                first = time.perf_counter()
            tokens.append(piece.token)
            texts.append(piece.text)
            finish = piece.finish
            if show:
                print(show(piece), end="", flush=True)
            if stopped():
                break
    except (EvermindPackError, KeyboardInterrupt):
        if show and (begun or tokens):
            print(flush=True)
        raise
    ended = time.perf_counter()
    speed = (len(tokens) - 1) / (ended - first) if len(tokens) > 1 else 0.0
    return Generated(tokens, "".join(texts), speed, (first - started) * 1000, finish)
