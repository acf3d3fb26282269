"""The golden cases of the families other than Evermind's (tests/fixtures/families)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent.parent / "fixtures" / "families"


@cache
def case(name: str) -> dict[str, Any]:
    """The case's JSON."""
    result: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return result


@cache
def arrays(name: str, group: str) -> dict[str, np.ndarray]:
    """The case's arrays under `group` ("w", "in" or "out"), without that prefix."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {
        key.removeprefix(f"{group}/"): array
        for key, array in tensors.items()
        if key.startswith(f"{group}/")
    }
