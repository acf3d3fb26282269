"""The report on a model's experts and routers: as an object, JSON values, Prometheus text.

Counters are there always; statistics, routers and observations after `Model.observe()`.
Definitions: docs/introspection.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from evermind_manifests.manifest import Layer

from .counts import ExpertCounts
from .jobs import ExpertPages
from .observer import ExpertStatistics, Observer, RouterStatistics, load_balance
from .policies import ExpertKey
from .state import Array

_TOP_PATHWAYS = 10
# The statistic that says how much an expert contributes.
_MAGNITUDE = "magnitude"


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """One expert. `statistics` are means over the rows it ran on while observed.

    `specialization` is the root mean square of its mean output less the mean output of all the
    layer's experts, in the unit of `magnitude`; 0 for an expert that did not run.
    """

    expert: int
    name: str
    tokens: int
    gate_mass: float
    hits: int
    misses: int
    bytes_read: int
    statistics: Mapping[str, float]
    specialization: float


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer's experts, in order."""

    layer: int
    experts: tuple[ExpertReport, ...]

    @property
    def unused_share(self) -> float:
        """The share of experts that no token ever went to."""
        return sum(not expert.tokens for expert in self.experts) / len(self.experts)

    @property
    def load_balance(self) -> float:
        """1 when all experts serve equally many tokens; see `observer.load_balance`."""
        return load_balance(np.array([expert.tokens for expert in self.experts]))

    @property
    def top_contributors(self) -> tuple[tuple[int, float], ...]:
        """(expert, mean magnitude), greatest first, ties by expert; 0 where one did not run."""
        pairs = [(one.expert, one.statistics.get(_MAGNITUDE, 0.0)) for one in self.experts]
        return tuple(sorted(pairs, key=lambda pair: -pair[1]))

    @property
    def specialization(self) -> float:
        """The mean over the experts that ran while observed; 0 if none did."""
        ran = [one.specialization for one in self.experts if one.statistics]
        return sum(ran) / len(ran) if ran else 0.0


@dataclass(frozen=True, slots=True)
class Introspection:
    """What a model has done: counters since it was loaded, the rest since `Model.observe()`."""

    tokens: int
    observed_tokens: int
    layers: tuple[LayerReport, ...]
    routers: tuple[RouterStatistics, ...] = ()
    observations: Mapping[str, Array] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON. Observations are nested lists, the newest token last."""
        return {
            "tokens": self.tokens,
            "observed_tokens": self.observed_tokens,
            "layers": [_layer_dict(layer) for layer in self.layers],
            "routers": [_router_dict(router) for router in self.routers],
            "observations": {name: array.tolist() for name, array in self.observations.items()},
        }

    def to_prometheus(self) -> str:
        """The text exposition format: counters and gauges by layer and expert."""
        lines: list[str] = []
        for name, kind, samples in self._metrics():
            rows = [f"evermind_{name}{{{labels}}} {value:.17g}" for labels, value in samples]
            if rows:
                lines += [f"# TYPE evermind_{name} {kind}", *rows]
        return "\n".join(lines) + "\n"

    def heat(self) -> tuple[list[int], list[list[float]]]:
        """(layers, the share of its layer's places that each expert got): rows of a heatmap."""
        rows = []
        for layer in self.layers:
            total = sum(expert.tokens for expert in layer.experts)
            rows.append([expert.tokens / total if total else 0.0 for expert in layer.experts])
        return [layer.layer for layer in self.layers], rows

    def _metrics(self) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
        experts = [
            (f'layer="{layer.layer}",expert="{expert.expert}"', expert)
            for layer in self.layers
            for expert in layer.experts
        ]
        for name in ("tokens", "gate_mass", "hits", "misses", "bytes_read"):
            samples = [(labels, float(getattr(expert, name))) for labels, expert in experts]
            yield f"expert_{name}_total", "counter", samples
        names = dict.fromkeys(name for _, expert in experts for name in expert.statistics)
        for name in names:
            samples = [(at, one.statistics[name]) for at, one in experts if name in one.statistics]
            yield f"expert_{name}", "gauge", samples
        ran = [(labels, one.specialization) for labels, one in experts if one.statistics]
        yield "expert_specialization", "gauge", ran
        balance = [(f'layer="{layer.layer}"', layer.load_balance) for layer in self.layers]
        yield "layer_load_balance", "gauge", balance
        pathways = [
            (f'layer="{router.router.layer}",pathway="{_escaped(label)}"', strength)
            for router in self.routers
            for label, strength in router.pathways.items()
        ]
        yield "pathway_strength", "gauge", pathways


def report(
    layers: tuple[Layer, ...],
    counts: ExpertCounts,
    pages: Mapping[ExpertKey, ExpertPages],
    tokens: int,
    observer: Observer | None,
) -> Introspection:
    """Put together what was counted and observed."""
    observed = observer.experts if observer else {}
    routers = {router.router.layer: router for router in observer.routers} if observer else {}
    reports = []
    for layer in layers:
        number = layer.layer
        used, mass = counts.of(number)
        distances = _distances({e: s for (at, e), s in observed.items() if at == number})
        experts = []
        for expert in range(layer.experts):
            page = pages.get((number, expert), ExpertPages())
            statistics = observed.get((number, expert))
            name = routers[number].name(expert) if number in routers else f"expert_{expert}"
            experts.append(
                ExpertReport(
                    expert,
                    name,
                    int(used[expert]),
                    float(mass[expert]),
                    page.hits,
                    page.misses,
                    page.bytes_read,
                    statistics.means if statistics else {},
                    distances.get(expert, 0.0),
                )
            )
        reports.append(LayerReport(number, tuple(experts)))
    return Introspection(
        tokens,
        observer.tokens if observer else 0,
        tuple(reports),
        tuple(observer.routers) if observer else (),
        observer.observations() if observer else {},
    )


def _distances(experts: Mapping[int, ExpertStatistics]) -> dict[int, float]:
    """How far each expert's mean output lies from that of all of them, as a root mean square."""
    if not experts:
        return {}
    total = np.sum([one.output for one in experts.values()], axis=0)
    mean = total / sum(one.rows for one in experts.values())
    return {
        expert: float(np.sqrt(np.mean((one.mean_output - mean) ** 2)))
        for expert, one in experts.items()
    }


def _layer_dict(layer: LayerReport) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "unused_share": layer.unused_share,
        "load_balance": layer.load_balance,
        "specialization": layer.specialization,
        "top_contributors": [list(pair) for pair in layer.top_contributors],
        "experts": [
            {
                "expert": one.expert,
                "name": one.name,
                "tokens": one.tokens,
                "gate_mass": one.gate_mass,
                "hits": one.hits,
                "misses": one.misses,
                "bytes_read": one.bytes_read,
                "specialization": one.specialization,
                **one.statistics,
            }
            for one in layer.experts
        ],
    }


def _router_dict(router: RouterStatistics) -> dict[str, Any]:
    return {
        "layer": router.router.layer,
        "expert_names": [router.name(expert) for expert in range(len(router.counts))],
        "expert_activation_counts": router.counts.tolist(),
        "expert_utilization": (router.counts / max(router.tokens, 1)).tolist(),
        "load_balance_score": load_balance(router.counts),
        "avg_confidence": router.confidence,
        "top_pathways": [list(item) for item in list(router.pathways.items())[:_TOP_PATHWAYS]],
        "decisions": [
            {
                "selected_experts": list(one.experts),
                "expert_weights": list(one.weights),
                "all_scores": list(one.scores),
                "confidence": one.confidence,
                "load_balance": one.load_balance,
                "pathway": one.pathway,
            }
            for one in router.decisions
        ],
    }


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
