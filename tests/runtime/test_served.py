"""Routes of pooled tokens, kept until they are counted: none is lost, and none stops decoding."""

from __future__ import annotations

from pathlib import Path

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import GraphError
from evermind_manifests.manifest import Layer
from evermind_runtime.counts import ExpertCounts
from evermind_runtime.program import Engine
from evermind_runtime.served import Served, ServedTokens
from hypothesis import given
from hypothesis import strategies as st

TOKEN = {"tokens": np.array([1])}


@given(st.lists(st.integers(0, 300), max_size=6))
def test_every_token_comes_out_once_and_in_order(runs: list[int]) -> None:
    served, found, made = ServedTokens({4: 2, 7: 1}), [], 0
    for run in runs:
        for _ in range(run):
            row = np.full(3, made)
            if full := served.add(row, row.astype(np.float32), keep=True):
                found += full[0][:, 0].tolist()
            made += 1
        ids, gates = served.take()
        assert ids.shape == gates.shape
        found += ids[:, 0].tolist()
    assert found == list(range(made))


def test_decoding_goes_on_after_an_interrupt_while_counting(
    lm_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, interrupts = Engine._count, [KeyboardInterrupt()]

    def interrupted(engine: Engine, served: Served) -> None:
        if interrupts:
            raise interrupts.pop()
        count(engine, served)

    with em.load(lm_package, plan="resident") as model:
        state = model.new_state()
        monkeypatch.setattr(Engine, "_count", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _decode(model, state, 1000)
        _decode(model, state, 300)
        uses = model.stats().expert_hits
        per_token = sum(layer.top_k for layer in model.manifest.layers)
        # Those whose counting was interrupted are missing.
        assert uses == 300 * per_token


def _decode(model: em.Model, state: em.State, tokens: int) -> None:
    for _ in range(tokens):
        model.decode(TOKEN, state)


def test_a_router_that_chooses_no_expert_is_refused_before_anything_is_counted() -> None:
    counts = ExpertCounts([Layer(layer=0, kind="k", experts=4, top_k=2)])
    gates = np.ones((1, 2), dtype=np.float32)
    for wrong in (4, 2**62):
        with pytest.raises(GraphError, match=rf"experts from 0 to 3, found {wrong}"):
            counts.routed(0, np.array([[0, wrong]]), gates)
    assert counts.of(0)[0].tolist() == [0] * 4
