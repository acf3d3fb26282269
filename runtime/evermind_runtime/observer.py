"""What a model does, measured while somebody observes: expert statistics, routes, values.

A model without an observer runs none of this. Definitions: specs/synapse.md, section 5, with
the departures that docs/introspection.md lists.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from evermind_manifests.manifest import Plan, Router

from .state import Array

# Values and decisions are kept for the last so many tokens; sums and counts for all.
KEPT_TOKENS: Final = 4096
# A second probability at or below this makes the first certain (section 5).
_LEAST_SECOND: Final = 1e-8
_MOST_CONFIDENCE: Final = 100.0


@dataclass(slots=True)
class ExpertStatistics:
    """Sums over the rows an expert ran on while observed."""

    rows: int
    output: npt.NDArray[np.float64]
    sums: dict[str, float]

    @property
    def means(self) -> dict[str, float]:
        """The mean of each statistic over rows."""
        return {name: total / self.rows for name, total in self.sums.items()}

    @property
    def mean_output(self) -> npt.NDArray[np.float64]:
        """The mean output `(d,)`."""
        return self.output / self.rows


@dataclass(frozen=True, slots=True)
class Decision:
    """One token's route. `confidence` is the best probability over the second best;
    `load_balance` that of the counts up to and with this token."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]
    scores: tuple[float, ...]
    confidence: float
    load_balance: float
    pathway: str


class RouterStatistics:
    """One router's decisions so far."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.counts: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.tokens = 0
        self.decisions: deque[Decision] = deque(maxlen=KEPT_TOKENS)
        self._confidence = 0.0
        # Strength of each pathway, and the token after which it had it.
        self._strengths: dict[str, tuple[float, int]] = {}

    def record(self, ids: Array, gates: Array, probabilities: Array) -> None:
        """Tokens in order: `ids`, `gates` `(T, k)`, `probabilities` `(T, E)`."""
        if not len(self.counts):
            self.counts = np.zeros(probabilities.shape[1], dtype=np.int64)
        rows = zip(ids.tolist(), gates.tolist(), probabilities.tolist(), strict=True)
        for experts, weights, scores in rows:
            self.tokens += 1
            chosen = [expert for expert in experts if expert >= 0]  # -1 is none
            self.counts[chosen] += 1
            confidence = _confidence(scores)
            self._confidence += min(confidence, _MOST_CONFIDENCE)
            label = self._follow(chosen)
            self.decisions.append(
                Decision(
                    tuple(experts),
                    tuple(weights),
                    tuple(scores),
                    confidence,
                    load_balance(self.counts),
                    label,
                )
            )

    @property
    def confidence(self) -> float:
        """The mean confidence, each at most 100."""
        return self._confidence / self.tokens if self.tokens else 0.0

    @property
    def pathways(self) -> dict[str, float]:
        """Strength by pathway, strongest first."""
        decay = self.router.decay
        now = {
            label: strength * decay ** (self.tokens - token)
            for label, (strength, token) in self._strengths.items()
        }
        return dict(sorted(now.items(), key=lambda item: -item[1]))

    def name(self, expert: int) -> str:
        """The label of an expert."""
        names = self.router.names
        return names[expert] if expert < len(names) else f"expert_{expert}"

    def _follow(self, experts: list[int]) -> str:
        """Strengthen the pathway of a token; all others decay, when they are next looked at."""
        label = "+".join(self.name(expert) for expert in sorted(experts))
        strength, token = self._strengths.get(label, (0.0, self.tokens - 1))
        decay = self.router.decay
        strength *= decay ** (self.tokens - 1 - token)
        self._strengths[label] = ((strength + self.router.rate) * decay, self.tokens)
        return label


@dataclass(slots=True)
class Observer:
    """Collects what `run_program` shows it. Safe to use from several threads."""

    plan: Plan
    tokens: int = 0
    experts: dict[tuple[int, int], ExpertStatistics] = field(default_factory=dict)
    routers: list[RouterStatistics] = field(init=False)
    _values: dict[str, deque[Array]] = field(default_factory=dict)
    _kept: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.routers = [RouterStatistics(router) for router in self.plan.routers]

    @property
    def wanted(self) -> list[str]:
        """The blackboard values that `record` needs."""
        names = [spec.value or name for name, spec in self.plan.observations.items()]
        for router in self.plan.routers:
            names += [router.ids, router.gates, router.probabilities]
        return list(dict.fromkeys(names))

    def ran(self, layer: int, expert: int, y: Array, statistics: Mapping[str, Array]) -> None:
        """An expert ran: its outputs `y` `(n, d)`, and statistics `(n,)` of each row."""
        with self._lock:
            found = self.experts.get((layer, expert))
            if found is None:
                zeros = np.zeros(y.shape[1], dtype=np.float64)
                found = ExpertStatistics(0, zeros, dict.fromkeys(statistics, 0.0))
                self.experts[layer, expert] = found
            found.rows += len(y)
            found.output += y.sum(axis=0, dtype=np.float64)
            for name, values in statistics.items():
                found.sums[name] += float(values.sum(dtype=np.float64))

    def record(self, values: Mapping[str, Array], tokens: int) -> None:
        """A program ran on `tokens` tokens and gave the `wanted` values."""
        with self._lock:
            self.tokens += tokens
            for router in self.routers:
                read = router.router
                router.record(values[read.ids], values[read.gates], values[read.probabilities])
            for name, spec in self.plan.observations.items():
                array = values[spec.value or name].copy()
                kept = self._values.setdefault(name, deque())
                if "T" not in spec.shape:
                    kept.clear()
                    kept.append(array)
                    continue
                kept.append(array)
                self._kept[name] += len(array)
                while self._kept[name] - len(kept[0]) >= KEPT_TOKENS:
                    self._kept[name] -= len(kept.popleft())

    def observations(self) -> dict[str, Array]:
        """Every observation; one with an axis of tokens holds the last `KEPT_TOKENS`."""
        with self._lock:
            return {
                name: parts[0] if len(parts) == 1 else np.concatenate(parts)[-KEPT_TOKENS:]
                for name, parts in self._values.items()
            }


def load_balance(counts: npt.NDArray[np.int64]) -> float:
    """1 when all experts serve equally many, falling to 0: `max(0, 1 - std/mean)`."""
    mean = float(counts.mean()) if len(counts) else 0.0
    return max(0.0, 1.0 - float(counts.std()) / mean) if mean else 1.0


def _confidence(scores: list[float]) -> float:
    best = sorted(scores, reverse=True)[:2]
    if len(best) < 2 or best[1] <= _LEAST_SECOND:
        return float(np.finfo(np.float32).max)
    return best[0] / best[1]
