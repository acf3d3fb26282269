from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


class Imported(NamedTuple):
    model: Any
    checkpoint: Path
    package: Path


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Imported]:
    """A tiny checkpoint of an architecture, imported once."""
    pytest.importorskip("transformers")
    from evermind_exporters.huggingface.import_ import import_checkpoint

    from .tiny import make

    made: dict[str, Imported] = {}

    def get(model_type: str) -> Imported:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = make(folder / "checkpoint", model_type)
            import_checkpoint(folder / "checkpoint", folder / "package")
            made[model_type] = Imported(model, folder / "checkpoint", folder / "package")
        return made[model_type]

    return get
