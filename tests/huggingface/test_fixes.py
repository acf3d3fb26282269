"""What is rewritten for the exporter, and what is shown where that is not enough."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.command_line import call

pytest.importorskip("transformers")

import torch
from evermind_exporters.huggingface import fixes
from evermind_exporters.huggingface.import_ import _parity_tokens
from evermind_exporters.huggingface.quiet import quiet

from .tiny import make


@pytest.fixture(scope="module")
def phimoe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("phimoe") / "checkpoint"
    return make(folder, "phimoe, longrope"), folder


@pytest.mark.parametrize("last", [5, 599, 600, 1000])
def test_longrope_of_phimoe_is_that_of_transformers(phimoe: tuple[Any, Path], last: int) -> None:
    module = phimoe[0].model.rotary_emb
    positions = torch.arange(last - 4, last + 1)[None]
    with torch.no_grad():
        expected = module(torch.zeros(1), position_ids=positions)
        with fixes.fixes(phimoe[0]):
            found = module(torch.zeros(1), position_ids=positions)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert "forward" not in vars(module)


def test_a_trace_that_is_refused_is_one_line(
    phimoe: tuple[Any, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.export prints the graph so far on stderr before it raises."""
    original = type(phimoe[0].model.rotary_emb).forward
    monkeypatch.setattr(fixes, "_phimoe_rotations", original)
    code, out, err = call(capsys, "import", phimoe[1], "-o", tmp_path / "p", "-q")
    assert (code, out) == (1, "")
    assert err.startswith("UnsupportedError: PhimoeForCausalLM: transformers cannot export")
    assert err.count("\n") == 1


def test_stderr_is_there_again_after_an_interrupt(capsys: Any) -> None:
    def interrupted() -> None:
        with quiet():
            print("a graph", file=sys.stderr)
            raise KeyboardInterrupt

    before = sys.stderr
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stderr is before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 16),
        ({"sliding_window": None}, 16),
        ({"sliding_window": 4}, 16),
        ({"sliding_window": 128}, 136),
        ({"sliding_window": 4096, "attention_chunk_size": 64}, 72),
        ({"sliding_window": 192, "max_position_embeddings": 100}, 100),
        ({"max_position_embeddings": 8}, 8),
    ],
)
def test_a_case_crosses_windows_and_chunks_that_are_short(
    fields: dict[str, Any], tokens: int
) -> None:
    from types import SimpleNamespace

    assert _parity_tokens(SimpleNamespace(**fields), 1_000) == tokens


def test_a_case_of_many_words_stays_short() -> None:
    from types import SimpleNamespace

    assert _parity_tokens(SimpleNamespace(sliding_window=128), 61_000) == 136
    assert _parity_tokens(SimpleNamespace(sliding_window=128), 200_000) == 16
