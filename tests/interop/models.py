"""Random models of all families for the live tests: edge dimensions first, then drawn ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from evermind_exporters.checkpoints import (
    Checkpoint,
    Family,
    canonical_shapes,
    validate_config,
    write_evl0,
    write_lmbc,
    write_moe0,
)

WRITERS = {
    "shared-expert-moe": write_moe0,
    "evermind-lm": write_evl0,
    "limbic": write_lmbc,
}
_MOE = ("modelDim", "hiddenDim", "numExperts", "topK")
_LM = ("vocabSize", "dModel", "numLayers", "convKernel", "hiddenDim", "numExperts", "topK")
_LIMBIC = ("inputDim", "hiddenDim", "stateDim")
_EDGES: list[tuple[Family, tuple[int, ...]]] = [
    ("shared-expert-moe", (1, 1, 1, 1)),
    ("shared-expert-moe", (3, 1, 5, 5)),
    ("shared-expert-moe", (1, 7, 4, 2)),
    ("shared-expert-moe", (17, 33, 16, 16)),
    ("evermind-lm", (1, 1, 1, 1, 1, 1, 1)),
    ("evermind-lm", (7, 1, 2, 3, 1, 3, 3)),
    ("evermind-lm", (123, 5, 1, 1, 3, 2, 1)),
    ("evermind-lm", (9, 3, 5, 9, 5, 7, 7)),
    ("evermind-lm", (256, 32, 2, 3, 64, 8, 2)),
    ("limbic", (1, 1, 1)),
    ("limbic", (3, 64, 8)),
    ("limbic", (33, 5, 9)),
]


@dataclass(frozen=True)
class Case:
    """One configuration, drawn from `number` alone; odd numbers are stored as half."""

    number: int
    family: Family
    config: dict[str, Any]

    @property
    def half(self) -> bool:
        return self.number % 2 == 1

    @property
    def id(self) -> str:
        dims = "x".join(str(value) for value in self.config.values())
        return f"{self.number:03d}-{self.family}-{dims}-{'f16' if self.half else 'f32'}"

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.number)

    def checkpoint(self) -> Checkpoint:
        """Weights that all matter: nothing zero, norms near one."""
        rng = self.rng()
        config = validate_config(self.family, self.config)
        tensors = {
            name: (rng.normal(size=shape) * 0.4 + ("norm" in name)).astype(np.float32)
            for name, shape in canonical_shapes(self.family, config).items()
        }
        return Checkpoint(self.family, config, tensors)

    def inputs(self) -> dict[str, Any]:
        rng = self.rng()
        config = self.config
        if self.family == "shared-expert-moe":
            return {"x": _values(rng, 3, config["modelDim"])}
        if self.family == "limbic":
            return {
                "x": _values(rng, 3, config["inputDim"]),
                "hidden": _values(rng, 3, config["hiddenDim"]),
                "state": _values(rng, 3, config["stateDim"]),
            }
        return {
            "tokens": rng.integers(0, config["vocabSize"], 9).tolist(),
            "steps": 6,
            "temperature": 0.8,
            "seed": self.number,
        }


def cases(count: int) -> list[Case]:
    """Every edge twice (float32 and half), then drawn configurations."""
    made: list[tuple[Family, tuple[int, ...]]] = [edge for edge in _EDGES for _ in range(2)]
    rng = np.random.default_rng(2026)
    families: list[Family] = ["evermind-lm", "shared-expert-moe", "evermind-lm", "limbic"]
    while len(made) < count:
        family = families[len(made) // 2 % 4]
        if family == "limbic":
            made.append((family, tuple(rng.integers(1, 24, 3).tolist())))
            continue
        experts = int(rng.integers(1, 9))
        top_k = experts if rng.random() < 0.25 else int(rng.integers(1, experts + 1))
        width, hidden = rng.integers(1, 25, 2).tolist()
        if family == "shared-expert-moe":
            made.append((family, (width, hidden, experts, top_k)))
        else:
            vocab, layers, kernel = (int(rng.integers(1, high)) for high in (60, 4, 5))
            made.append((family, (vocab, width, layers, kernel, hidden, experts, top_k)))
    keys = {"shared-expert-moe": _MOE, "evermind-lm": _LM, "limbic": _LIMBIC}
    return [
        Case(number, family, dict(zip(keys[family], dims, strict=True)))
        for number, (family, dims) in enumerate(made)
    ]


def _values(rng: np.random.Generator, rows: int, width: int) -> list[list[float]]:
    return rng.normal(size=(rows, width)).astype(np.float32).tolist()
