from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.packages import export, golden_source, lm_source, random_source
from tests.runtime.large_experts import CONFIG, TOKENS, load


@pytest.fixture(scope="session")
def golden_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`golden_package("lm_small", half=False)`: that model as a package, made once."""
    made: dict[tuple[str, bool], Path] = {}
    root = tmp_path_factory.mktemp("golden")

    def get(case: str, *, half: bool = False) -> Path:
        if (case, half) not in made:
            source = golden_source(case, half=half)
            dtype = "f16" if half else "f32"
            made[case, half] = export(source, root / f"{case}-{dtype}", dtype=dtype)
        return made[case, half]

    return get


@pytest.fixture(scope="session")
def lm_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model, f16: 3 layers of 8 experts, top-2."""
    return export(lm_source(), tmp_path_factory.mktemp("lm") / "lm")


@pytest.fixture(scope="session")
def large_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 experts of 516 KiB (`large_experts.py`)."""
    return export(random_source("evermind-lm", CONFIG), tmp_path_factory.mktemp("large") / "lm")


@pytest.fixture(scope="session")
def large_results(large_package: Path) -> dict[str, Any]:
    """What `large_package` gives of `TOKENS`, unpaged, by kind of steps."""
    with load(large_package) as model:
        return {
            "prefill": model.forward(TOKENS, steps="prefill"),
            "decode": model.forward(TOKENS, steps="decode"),
        }
