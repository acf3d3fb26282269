"""The embedding API: inputs checked, state in the caller's hands, many requests at once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import DeviceError, InputError

from tests.packages import LM_CONFIG, export, random_source

TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.fixture(scope="module")
def model(lm_package: Path) -> em.Model:
    return em.load(lm_package, budget="50%")


def test_a_batch_runs_each_row_with_its_own_state(model: em.Model) -> None:
    batch = model.forward({"tokens": TOKENS.reshape(2, 4)})
    assert batch["logits"].shape == (2, 4, LM_CONFIG["vocabSize"])
    for row in range(2):
        alone = model.forward({"tokens": TOKENS.reshape(2, 4)[row]})
        assert np.array_equal(batch["logits"][row], alone["logits"])


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_state_carries_on_where_it_was(model: em.Model, steps: Any) -> None:
    whole = model.forward({"tokens": TOKENS}, steps="decode")["logits"]
    state = model.new_state()
    model.forward({"tokens": TOKENS[:5]}, state=state, steps=steps)
    saved, twin = state.save(), state.copy()
    rest = model.forward({"tokens": TOKENS[5:]}, state=state, steps="decode")["logits"]
    assert np.abs(rest - whole[5:]).max() <= 1e-5 * np.abs(whole).max()

    restored = model.new_state()
    restored.restore(saved)
    for other in (twin, restored):
        again = model.forward({"tokens": TOKENS[5:]}, state=other, steps="decode")["logits"]
        assert np.array_equal(again, rest)


def test_a_state_that_does_not_fit_is_refused(model: em.Model) -> None:
    state = model.new_state()
    with pytest.raises(InputError, match=r"conv\.0"):
        state.restore({})
    wrong = state.save()
    wrong["conv.1"] = wrong["conv.1"].astype(np.complex64)
    with pytest.raises(InputError, match=r"conv\.1.*float32.*complex64"):
        state.restore(wrong)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "tokens i64"),
        ({"token": [1]}, "found token"),
        ({"tokens": [1.5]}, "expected int64, found float64"),
        ({"tokens": [True]}, "expected int64, found bool"),
        ({"tokens": 3}, "batch axis"),
        ({"tokens": [[[1]]]}, "batch axis"),
        ({"tokens": [[1, 2], [3]]}, "not an array"),
        ({"tokens": [1, 96]}, "from 0 to 95, found 96 at position 1"),
        ({"tokens": [-1]}, "found -1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    model: em.Model, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.forward(inputs)


def test_prompts_that_do_not_fit_are_refused(model: em.Model) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        model.generate("text")
    with pytest.raises(InputError, match="found 96"):
        model.generate([96])
    for token in (1.5, True, "1"):
        with pytest.raises(InputError, match="expected token ids"):
            model.generate([token])  # type: ignore[list-item]
    with pytest.raises(InputError, match="max_new_tokens"):
        model.generate([1], max_new_tokens=-1)
    assert list(model.generate([1], max_new_tokens=0)) == []


def test_threads_share_one_pager(lm_package: Path) -> None:
    """Eight threads, room for two working sets: same tokens as alone, budget kept."""
    with em.load(lm_package) as alone:
        expected = [
            [piece.token for piece in alone.generate([n], max_new_tokens=30)] for n in range(8)
        ]
    found: list[list[int]] = [[] for _ in range(8)]
    with em.load(lm_package, budget="25%") as model:

        def work(n: int) -> None:
            found[n] = [piece.token for piece in model.generate([n], max_new_tokens=30)]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = model.stats()
        assert stats.peak_resident_expert_bytes <= model.budget
        assert stats.expert_hits + stats.expert_misses == 8 * 30 * 3 * 2
    assert found == expected


def test_a_generator_dropped_half_way_pins_nothing(lm_package: Path) -> None:
    with em.load(lm_package, budget="25%") as model:
        for _ in range(20):
            pieces = model.generate([1], max_new_tokens=10)
            next(pieces)
            pieces.close()
        assert model._pager.slots.pinned == 0


def test_byte_tokenizer_streams_whole_characters(tmp_path: Path) -> None:
    config = LM_CONFIG | {"vocabSize": 256}
    source = random_source("evermind-lm", config, tokenizer="bytes")
    with em.load(export(source, tmp_path / "bytes")) as model:
        assert model.codec is not None
        assert model.codec.encode("é€") == list("é€".encode())
        stream = model.codec.stream()
        parts = [stream.push(byte) for byte in "aé€".encode()]
        assert parts == ["a", "", "é", "", "", "€"]
        assert stream.push(0xE2) == ""
        assert stream.finish() == "\ufffd"
        text = "".join(piece.text for piece in model.generate("é", max_new_tokens=16))
        raw = bytes(piece.token for piece in model.generate("é", max_new_tokens=16))
        assert text == raw.decode(errors="replace")


def test_a_thread_count_that_cannot_be_had_is_refused(model: em.Model, lm_package: Path) -> None:
    with pytest.raises(DeviceError, match="expected 1 to"):
        em.load(lm_package, threads=9999)
    with pytest.raises(DeviceError, match="already runs with"):
        em.load(lm_package, threads=model.threads + 1)
    assert em.load(lm_package, threads=model.threads).threads == model.threads


def test_an_unknown_device_is_refused(lm_package: Path) -> None:
    with pytest.raises(DeviceError, match="'tpu'"):
        em.load(lm_package, device="tpu")


def test_limbic_session_integrates_and_clamps(golden_package: Any) -> None:
    with em.load(golden_package("limbic_small")) as model:
        calm = em.LimbicSession(model)
        bold = em.LimbicSession(model, traits={"riskTolerance": 100}, gain=50.0)
        assert calm.record()["arousal"] == pytest.approx(0.2)
        assert bold.setpoint[3] == pytest.approx(0.2)
        x = np.linspace(-1, 1, 5)
        expected = model.forward({"x": x[None], "state": calm.state[None]})
        step = calm.step(x)
        assert np.array_equal(step.delta, expected["delta"][0])
        assert np.array_equal(step.hidden, expected["hidden"][0])
        for _ in range(10):
            state = bold.step(x).state
            assert (np.abs(state) <= 1).all()
            assert (state[1:] >= 0).all()
        assert not np.array_equal(bold.hidden, np.zeros(4))
        bold.reset()
        assert np.array_equal(bold.state, bold.setpoint)
        recovering = em.LimbicSession(model, gain=0.0, recovery=0.5)
        recovering.state = np.ones(8, dtype=np.float32)
        recovering.step(x)
        assert recovering.state[0] == pytest.approx(0.5)


def test_limbic_session_refuses_other_models(model: em.Model) -> None:
    with pytest.raises(InputError, match="limbic"):
        em.LimbicSession(model)
