"""Models to measure with: `evermind-lm` of any dimensions with random weights, and its packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from evermind_exporters import ExportOptions, ModelSource, export_package
from evermind_exporters.checkpoints import canonical_shapes, validate_config

from .common import random_values

FAMILY = "evermind-lm"


def language_model(
    *, vocab: int = 1024, width: int, layers: int, experts: int, top_k: int, hidden: int
) -> ModelSource:
    """Random weights, which route almost evenly: the worst case for any cache.

    Matrices have the variance of their fan-in, so that values neither vanish nor explode;
    the tied embedding is small, so that sampling at temperature 1 draws from many tokens.
    """
    config = validate_config(
        FAMILY,
        {
            "vocabSize": vocab,
            "dModel": width,
            "numLayers": layers,
            "convKernel": 3,
            "hiddenDim": hidden,
            "numExperts": experts,
            "topK": top_k,
        },
    )
    return ModelSource(FAMILY, config, random_tensors(config), "random")


def random_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of an `evermind-lm`; the same config gives the same weights."""
    tensors = {}
    for seed, (name, shape) in enumerate(canonical_shapes(FAMILY, config).items()):
        scale = 0.05 if "embedding" in name or len(shape) == 1 else shape[-1] ** -0.5
        tensors[name] = random_values(shape, seed, scale)
        if "norm" in name:
            tensors[name] += np.float32(1)
    return tensors


def package(source: ModelSource, destination: Path, **options: Any) -> Path:
    """`source` exported to `destination`; options as `ExportOptions` takes them."""
    export_package(source, destination, ExportOptions(**options))
    return destination
