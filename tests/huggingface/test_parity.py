"""Imported packages against transformers' own runs of the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import evermind_runtime
import numpy as np
import numpy.typing as npt
import pytest
from evermind_manifests.validate import validate

from .conftest import Imported

# Of the logits' largest magnitude; both sides compute in float32.
TOLERANCE = 5e-5
PROMPT = [5, 17, 80, 3, 44, 9, 61, 30]


def logits_of(model: Any, tokens: list[int]) -> npt.NDArray[np.float32]:
    import torch

    with torch.no_grad():
        found: npt.NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return found


def error(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float:
    return float(np.abs(expected - found).max() / np.abs(expected).max())


def test_32_greedy_tokens_are_those_of_transformers(
    imported: Callable[[str], Imported], model_type: str
) -> None:
    import torch

    made = imported(model_type)
    tokens = made.model.generate(
        torch.tensor([PROMPT]), max_new_tokens=32, do_sample=False, eos_token_id=None
    )[0].tolist()
    with evermind_runtime.load(made.package) as model:
        pieces = list(model.generate(PROMPT, max_new_tokens=32, stop_tokens=[]))
    assert [piece.token for piece in pieces] == tokens[len(PROMPT) :]
    assert len(pieces) == 32


def test_logits_agree_in_both_programs_and_across_a_chunk(
    imported: Callable[[str], Imported], model_type: str
) -> None:
    made = imported(model_type)
    # More than one prefill chunk (512 tokens): the second continues on the first's cache.
    tokens = np.random.default_rng(2).integers(0, 96, 520).tolist()
    expected = logits_of(made.model, tokens)
    with evermind_runtime.load(made.package) as model:
        prefilled = model.forward({"tokens": tokens})["logits"]
        decoded = model.forward({"tokens": tokens[:40]}, steps="decode")["logits"]
    assert error(expected, prefilled) <= TOLERANCE
    assert error(expected[:40], decoded) <= TOLERANCE
    assert error(prefilled[:40], decoded) <= 1e-5


def test_a_saved_state_is_a_place_to_go_on_from(
    imported: Callable[[str], Imported], model_type: str
) -> None:
    made = imported(model_type)
    tokens = np.random.default_rng(6).integers(0, 96, 24).tolist()
    expected = logits_of(made.model, tokens)[12:]
    with evermind_runtime.load(made.package) as model:
        state = model.new_state()
        model.forward({"tokens": tokens[:12]}, state=state)
        saved = state.save()
        prefilled = model.forward({"tokens": tokens[12:]}, state=state)["logits"]
        state.restore(saved)
        decoded = model.forward({"tokens": tokens[12:]}, state=state, steps="decode")["logits"]
    assert error(expected, prefilled) <= TOLERANCE
    assert error(expected, decoded) <= TOLERANCE


@pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")
def test_a_quarter_of_the_experts_in_memory_gives_the_same_bits(
    imported: Callable[[str], Imported], model_type: str
) -> None:
    made = imported(model_type)
    tokens = np.random.default_rng(4).integers(0, 96, 24).tolist()
    results = []
    for budget in ("25%", "100%"):
        with evermind_runtime.load(made.package, budget=budget, plan="paged") as model:
            prefilled = model.forward({"tokens": tokens})["logits"]
            decoded = model.forward({"tokens": tokens}, steps="decode")["logits"]
            results.append((prefilled, decoded))
            evicted = model.stats().evictions
        assert (evicted > 0) == (budget == "25%")
    for paged, whole in zip(*results, strict=True):
        np.testing.assert_array_equal(paged, whole)


def test_the_package_is_valid(imported: Callable[[str], Imported], model_type: str) -> None:
    report = validate(imported(model_type).package, deep=True)
    assert not report.problems
