from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


# Between them: one file and many, per-expert and fused experts, and every precision. Those in half
# precision have graphs that compute in it too.
FORMS: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "mixtral": {"dtype": "bfloat16", "max_shard_size": "20KB"},
    "qwen3_moe": {"fused": True},
    "gpt_oss": {"dtype": "float16"},
    "jamba": {"dtype": "float16"},
    # Of what an ordinary run leaves out.
    "deepseek_v3": {"dtype": "bfloat16"},
    "qwen2_moe": {"dtype": "bfloat16"},
    "qwen3_next": {"dtype": "bfloat16"},
    "lfm2_moe": {"dtype": "bfloat16"},
    # Attention with a mask.
    "zaya": {"dtype": "bfloat16"},
    "ernie4_5_moe": {"dtype": "float16"},
    "phimoe": {"dtype": "bfloat16"},
}


class Imported(NamedTuple):
    model: Any
    checkpoint: Path
    package: Path
    half: Any


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-architecture", action="store_true", help="import all that is carried (minutes)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        from .tiny import ARCHITECTURES, CARRIED

        every = metafunc.config.getoption("--every-architecture", default=False)
        metafunc.parametrize("model_type", [*ARCHITECTURES, *(CARRIED if every else ())])


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Imported]:
    """A tiny checkpoint of an architecture, imported once."""
    pytest.importorskip("transformers")
    from evermind_exporters.huggingface.import_ import ImportOptions, import_checkpoint

    from .tiny import make

    made: dict[str, Imported] = {}

    def get(model_type: str) -> Imported:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            form = FORMS.get(model_type, {})
            model = make(folder / "checkpoint", model_type, **form)
            result = import_checkpoint(
                folder / "checkpoint",
                folder / "package",
                ImportOptions(compute="both" if "dtype" in form else "f32"),
            )
            made[model_type] = Imported(
                model, folder / "checkpoint", folder / "package", result.half
            )
        return made[model_type]

    return get
