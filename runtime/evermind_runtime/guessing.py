"""Does guessing pay? What became of the experts that were read ahead on a guess. Pure."""

from __future__ import annotations

from typing import Literal, TypeAlias

GuessMode: TypeAlias = Literal["auto", "off"]

# Guesses of one layer that needed reading, before each judgement.
WINDOW = 32
LEAST_SHARE = 0.5


class GuessRecord:
    """One layer's guesses: given up for good once fewer than half of a window were right.

    Only guesses that had to be read count: what is resident is most of what is easy to guess.
    How well a router can be guessed is a matter of the trained model, so there is no second
    try; and a wrong guess spends a read that a step may be waiting for.
    """

    def __init__(self) -> None:
        self.on = True
        self._reads = 0
        self._used = 0

    def resolved(self, *, used: bool) -> None:
        """An expert that was read on a guess was needed by the layer's next step, or not."""
        self._reads += 1
        self._used += used
        if self._reads == WINDOW:
            self.on = self.on and self._used >= LEAST_SHARE * WINDOW
            self._reads = self._used = 0
