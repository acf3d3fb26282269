"""Checkpoint → package → checkpoint: nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.command_line import call

from .conftest import Imported

pytest.importorskip("transformers")
PROMPT = [5, 17, 80, 3, 44, 9, 61, 30]


def logits(folder: Path) -> np.ndarray[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(torch.tensor([PROMPT])).logits[0].numpy()
    return found


def test_a_checkpoint_comes_back_bit_by_bit(
    imported: Callable[[str], Imported], model_type: str, tmp_path: Path, capsys: Any
) -> None:
    made = imported(model_type)
    out = tmp_path / "back"
    code, text, _ = call(capsys, "convert", made.package, "-o", out, "--to", "hf", "--json")
    assert code == 0, text
    result = json.loads(text)
    assert (result["lossless"], result["rounded"]) == (True, [])
    source = {path.name: path.read_bytes() for path in made.checkpoint.iterdir()}
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert found.keys() == source.keys()
    for name, data in source.items():
        if name.endswith(".index.json"):
            assert json.loads(found[name]) == json.loads(data)
        else:  # the very files: the library that wrote them has one way to
            assert found[name] == data, name
    np.testing.assert_array_equal(logits(out), logits(made.checkpoint))
