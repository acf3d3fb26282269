"""Does guessing pay? What became of the experts that were read ahead on a guess. Pure."""

from __future__ import annotations

from typing import Literal, TypeAlias

GuessMode: TypeAlias = Literal["auto", "on", "off"]

# How far wrong guesses of a layer may be ahead of right ones. Where 32 % are right they are after
# 22 reads in the mean, where half are after 200, and where 60 % are after some nine thousand.
MARGIN = 8


class GuessRecord:
    """One layer's guesses: given up for good once wrong ones are `MARGIN` ahead of right ones.

    The right ones count up to as many ahead: what was right long ago does not count for ever.
    Only guesses that had to be read count: what is resident is most of what is easy to guess.
    How well a router can be guessed is a matter of the trained model, so there is no second
    try; and a wrong guess spends a read that a step may be waiting for.
    """

    def __init__(self) -> None:
        self.on = True
        self._ahead = 0

    def resolved(self, *, used: bool) -> None:
        """An expert that was read on a guess was needed by the layer's next step, or not."""
        self._ahead = min(self._ahead + (1 if used else -1), MARGIN)
        if self._ahead <= -MARGIN:
            self.on = False
