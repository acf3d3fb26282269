"""Caches of sliding windows and chunks: bounded by these, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import evermind_runtime
import numpy as np
import pytest
from evermind_runtime.rows import spare_rows

from .conftest import Imported
from .test_parity import TOLERANCE, error, logits_of

WINDOW, TOKENS = 8, 620
#: Architecture → the caches that a window bounds.
BOUNDED = {"mixtral, window": {"0", "1"}, "gpt_oss": {"0"}, "llama4_text": {"0", "1"}}


@pytest.fixture(params=BOUNDED)
def windowed(request: Any, imported: Callable[[str], Imported]) -> tuple[str, Imported]:
    return request.param, imported(request.param)


def test_several_windows_and_chunks_give_what_transformers_gives(
    windowed: tuple[str, Imported],
) -> None:
    kind, made = windowed
    tokens = np.random.default_rng(7).integers(0, 96, TOKENS).tolist()
    expected = logits_of(made.model, tokens)
    with evermind_runtime.load(made.package) as model:
        state = model.new_state()
        first = model.forward({"tokens": tokens[:530]}, state=state)["logits"]  # two chunks
        saved = state.save()
        rest = model.forward({"tokens": tokens[530:]}, state=state, steps="decode")["logits"]
        assert error(expected[:530], first) <= TOLERANCE
        assert error(expected[530:], rest) <= TOLERANCE
        for name, array in state.current.items():
            if name != "position":
                bounded = name.split(".")[1] in BOUNDED[kind]
                rows = array.shape[2]
                assert rows < WINDOW + spare_rows(WINDOW) if bounded else rows == TOKENS
        # Other chunks, from a state that was saved: the same but for rounding, then the same.
        twin = model.new_state()
        twin.restore(saved)
        again = model.forward({"tokens": tokens[530:]}, state=twin, steps="decode")["logits"]
        np.testing.assert_array_equal(again, rest)
        decoded = model.forward({"tokens": tokens[:200]}, steps="decode")["logits"]
        assert error(expected[:200], decoded) <= TOLERANCE


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_forgotten_rows_change_no_number_beyond_rounding(
    windowed: tuple[str, Imported], steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same calls with caches that keep everything: attention over the same rows."""
    _, made = windowed
    tokens = np.random.default_rng(8).integers(0, 96, 300)

    def logits() -> tuple[Any, int]:
        with evermind_runtime.load(made.package) as model:
            state = model.new_state()
            parts = [
                model.forward({"tokens": tokens[at : at + 60]}, state=state, steps=steps)["logits"]
                for at in range(0, 300, 60)
            ]
            return np.concatenate(parts), state.current["keys.0"].shape[2]

    bounded, rows = logits()
    monkeypatch.setattr("evermind_runtime.rows.spare_rows", lambda window: 1 << 20)
    whole, all_rows = logits()
    assert rows < WINDOW + spare_rows(WINDOW) + 60 < all_rows == 300
    np.testing.assert_allclose(bounded, whole, rtol=0, atol=1e-6 * np.abs(whole).max())
    assert (bounded.argmax(-1) == whole.argmax(-1)).all()
