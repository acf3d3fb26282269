"""Fixtures every test folder uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def pytest_configure() -> None:
    """Compute on all cores, where the small packages of tests would take one thread."""
    from evermind_runtime import onnx_runtime

    onnx_runtime.start()


_GOLDEN = Path(__file__).parent / "fixtures" / "evermind"


@dataclass(frozen=True)
class GoldenCase:
    """One golden case: `json` is its case.json, binaries by file name."""

    folder: Path
    json: dict[str, Any]

    def bytes(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def array(self, name: str, dtype: str = "<f4") -> np.ndarray:
        return np.frombuffer(self.bytes(name), dtype=dtype)


@pytest.fixture
def golden() -> Callable[[str], GoldenCase]:
    """`golden("moe_small")` gives that case of tests/fixtures/evermind."""

    def load(case: str) -> GoldenCase:
        folder = _GOLDEN / case
        return GoldenCase(folder, json.loads((folder / "case.json").read_text("utf-8")))

    return load
