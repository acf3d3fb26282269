from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packages import export, golden_source, lm_source


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
