"""Texts that fill the context of a model, and what is said when a text ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import InputError

from evermind_pack.cli import main

from .conftest import Imported
from .tiny import COMMON

CONTEXT = COMMON["max_position_embeddings"]
PROMPT = np.random.default_rng(3).integers(3, COMMON["vocab_size"], CONTEXT).tolist()


@pytest.fixture(scope="module")
def model(imported: Callable[[str], Imported]) -> Iterator[em.Model]:
    with em.load(imported("olmoe").package) as model:
        yield model


def test_a_text_ends_where_the_context_is_full(model: em.Model) -> None:
    state = model.new_state()
    pieces = list(model.generate(PROMPT[:-4], max_new_tokens=64, stop_tokens=[], state=state))
    # The last token is made of a full context, and needs no place in it.
    assert len(pieces) == 5
    assert [piece.finish for piece in pieces] == [None] * 4 + ["context"]
    assert state.room == 0
    for prompt in ([5], []):
        with pytest.raises(InputError, match=r"expected at most 0 more tokens.*found 1"):
            model.generate(prompt, state=state)


def test_of_two_texts_over_one_state_the_second_says_that_it_is_full(model: em.Model) -> None:
    state = model.new_state()
    first, second = (
        model.generate(prompt, max_new_tokens=9, stop_tokens=[], state=state)
        for prompt in (PROMPT, [5])
    )
    assert next(first).finish == "context"
    with pytest.raises(InputError, match=r"expected at most 0 more tokens"):
        next(second)


def test_a_prompt_that_the_context_cannot_take_is_refused_before_it_is_run(
    model: em.Model,
) -> None:
    whole = list(model.generate(PROMPT, max_new_tokens=9, stop_tokens=[]))
    assert [piece.finish for piece in whole] == ["context"]
    with pytest.raises(InputError, match=r"prompt: expected at most 1,024 tokens.*found 1,025"):
        model.generate([*PROMPT, 5])


def test_the_last_piece_says_why_a_text_ends(model: em.Model) -> None:
    pieces = list(model.generate([5], max_new_tokens=3, stop_tokens=[]))
    assert [piece.finish for piece in pieces] == [None, None, "length"]
    stop = pieces[1].token
    stopped = list(model.generate([5], max_new_tokens=3, stop_tokens=[stop]))
    assert stopped[-1].finish == "stop"


def test_run_gives_what_it_made_where_the_context_is_full(
    model: em.Model,
    imported: Callable[[str], Imported],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens = ",".join(map(str, PROMPT[:-2]))
    command = ["run", str(imported("olmoe").package), "--tokens", tokens, "--max-new", "50"]
    assert main([*command, "--stop-token", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["tokens"]), found["finish"]) == (3, "context")
    assert main([*command, "--stop-token", "0"]) == 0
    assert "3 tokens, which fill the model's context" in capsys.readouterr().err
