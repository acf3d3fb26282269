"""Choosing the next token.

Greedy and plain temperature sampling are the peer's, number for number
(specs/evermind-formats.md, section 8.4). The knobs of `warping.py` are transformers', in its order:
repetition penalty, temperature, top-k, top-p, min-p. Draws are always the peer's generator's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Generation

from .lcg import Lcg
from .warping import Warping, penalise

DEFAULT_SEED = 1
# Logits over less would leave the range of float32.
_LEAST_TEMPERATURE = 1e-30
# A bound on what rounding does to a sum of up to 2^26 weights, over the sum: 2^-24 for a weight's
# rounding to float32, in the sum and in what is taken off it, 2^-53 for every addition, and some
# 2^-42 for an exponent's.
_ROUNDING = 2.0**-22
# Weights of so large an exponent, and sums of 2^26 of them, are still far from the range's ends.
_MOST_EXPONENT = 600.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; `None` is what the package says, and `seed` 1.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token, `min_p` 0 too; a
    `repetition_penalty` above 1 makes tokens that were there less likely.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def sampler(self, defaults: Generation) -> Sampler:
        """A sampler with what is not given taken from `defaults`.

        Raises `InputError` for a value out of range, and for a knob that would do nothing as
        the most likely token is taken anyway.
        """
        temperature = _first(self.temperature, defaults.temperature)
        if math.isnan(temperature):
            raise InputError("temperature: expected a number, found NaN")
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if idle and temperature <= 0:
            raise InputError(
                f"{idle[0]}: has no effect where the most likely token is always taken",
                hint="Give a temperature above 0 as well, such as 1.",
            )
        warping = Warping(
            top_k=_first(self.top_k, defaults.top_k),
            top_p=_first(self.top_p, defaults.top_p),
            min_p=_first(self.min_p, defaults.min_p),
        )
        if isinstance(warping.top_k, bool) or not isinstance(warping.top_k, int | np.integer):
            raise InputError(f"top_k: expected a whole number, found {warping.top_k!r}")
        if warping.top_k < 0:
            raise InputError(f"top_k: expected 0 (all) or more, found {warping.top_k}")
        if 0 < temperature < _LEAST_TEMPERATURE and not warping.keeps_all:
            raise InputError(
                f"temperature: expected 0 or at least {_LEAST_TEMPERATURE} beside top_k, top_p "
                f"and min_p, which are computed in float32, found {temperature}"
            )
        for name in ("top_p", "min_p"):
            if not 0 <= (value := getattr(warping, name)) <= 1:
                raise InputError(f"{name}: expected a number from 0 to 1, found {value}")
        penalty = _first(self.repetition_penalty, defaults.repetition_penalty)
        if not 0 < penalty < math.inf:
            raise InputError(f"repetition_penalty: expected a number above 0, found {penalty}")
        return Sampler(temperature, self.seed, warping=warping, repetition_penalty=penalty)


class Sampler:
    """Greedy (`temperature` 0 or less) or drawn with the peer's generator.

    One uniform is drawn per sampled token; a seed of 0 is the same stream as 1.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        seed: int | None = None,
        *,
        warping: Warping | None = None,
        repetition_penalty: float = 1.0,
    ) -> None:
        self._temperature = temperature
        self._warping = warping or Warping()
        self._warps = not self._warping.keeps_all
        self._penalty = repetition_penalty
        self._seen: set[int] = set()
        self._lcg = Lcg(DEFAULT_SEED if seed is None else seed)

    def see(self, tokens: Iterable[int]) -> None:
        """Tokens that the repetition penalty counts; those that are picked it counts anyway."""
        if self._penalty != 1:
            self._seen.update(tokens)

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token id for `logits` `(vocab,) float32`."""
        if self._penalty == 1:
            return self._choose(logits)
        if self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            logits = penalise(logits, seen, self._penalty)
        choice = self._choose(logits)
        self._seen.add(choice)
        return choice

    def _choose(self, logits: npt.NDArray[np.float32]) -> int:
        if self._temperature <= 0:
            return greedy(logits)
        if not self._warps:
            return draw(logits, self._temperature, self._lcg.next())
        scores = self._warping.apply(logits, self._temperature)
        kept = np.flatnonzero(scores > -np.inf)
        # Nothing is left where logits are NaN.
        return int(kept[draw(scores[kept], 1.0, self._lcg.next())]) if len(kept) else greedy(logits)


def draw(logits: npt.NDArray[np.float32], temperature: float, uniform: float) -> int:
    """The id that `uniform` in [0, 1) falls on when ids weigh `exp(logit / temperature)`.

    The peer rounds weights to float32 and takes them off one by one; this finds the same id in
    sums of unrounded ones, unless a boundary is so near that rounding decides.
    """
    # In no call more than are needed: after a token's weights the processor's caches have
    # nothing of numpy any more.
    most = logits.item(logits.argmax()) / temperature
    if -_MOST_EXPONENT < most < _MOST_EXPONENT:  # not where there is a NaN
        scaled = logits if temperature == 1 else np.divide(logits, temperature, dtype=np.float64)
        upto = np.add.accumulate(np.exp(scaled, dtype=np.float64))
        total = upto.item(-1)
        target = uniform * total
        margin = total * _ROUNDING
        choice = int(upto.searchsorted(target))
        if (
            choice < len(upto)
            and upto.item(choice) - target > margin
            and (choice == 0 or target - upto.item(choice - 1) > margin)
        ):
            return choice
    return draw_in_order(logits, temperature, uniform)


def draw_in_order(logits: npt.NDArray[np.float32], temperature: float, uniform: float) -> int:
    """The same with the peer's roundings, sums and differences, in its order (section 8.4)."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max()
    weights = np.exp(scaled, out=scaled).astype(np.float32)
    left = np.empty(len(weights) + 1)
    left[1:] = weights
    left[0] = uniform * np.add.accumulate(left[1:])[-1]
    below = np.subtract.accumulate(left, out=left)[1:] <= 0
    choice = int(below.argmax())
    return choice if below[choice] else len(weights) - 1


def greedy(logits: npt.NDArray[np.float32]) -> int:
    """The id of the largest logit, the lowest among equals.

    NaN never wins, but a NaN in position 0 makes the answer 0, as in the peer.
    """
    # Where there is a NaN, argmax finds the first.
    choice = int(logits.argmax())
    if not math.isnan(logits[choice]):
        return choice
    return 0 if choice == 0 else int(np.nanargmax(logits))


def _first(given: _T | None, default: _T) -> _T:
    return default if given is None else given
