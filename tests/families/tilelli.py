"""Tilelli models as files, as `export` reads them, and as packages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evermind_exporters import read_source

from tests.golden_families import family_case
from tests.packages import export, write_model

BLOCKS = [
    *(f"tilelli_block_p{p}_b{banks}_k{k}" for p in (3, 5) for banks in (1, 4) for k in (0, 2)),
    "tilelli_block_fp",
]
LM = "tilelli_lm"


def golden_model(folder: Path, name: str, **config: Any) -> Path:
    """A golden case's model, with more in its configuration."""
    case = family_case(name)
    return write_model(folder, {**case.config, "family": "tilelli", **config}, case.weights)


def random_model(folder: Path, config: Mapping[str, Any]) -> Path:
    """A fresh language model whose norms differ by channel.

    Ternary weights of plain norms give sums of a few values, where router columns tie.
    """
    from evermind_pack.models import AtomeLmModel

    model = AtomeLmModel({key: value for key, value in config.items() if key != "family"})
    rng = np.random.default_rng(9)
    weights = {
        name: (array + rng.normal(size=array.shape) * 0.3).astype(np.float32)
        if "norm." in name
        else array
        for name, array in model.to_tensors().items()
    }
    return write_model(folder, config, weights)


def package(source: Path, destination: Path, *, parity: bool = False, **options: Any) -> Path:
    """The model in `source` as a package."""
    return export(read_source(source), destination, parity=parity, **options)
