"""The knobs of sampling against transformers' own logits processors."""

from __future__ import annotations

import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Generation
from evermind_runtime.sampling import Sampler, Sampling
from evermind_runtime.warping import Warping, keep_min_p, keep_top_k, keep_top_p, penalise
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
process = pytest.importorskip("transformers.generation.logits_process")

# At a boundary the last bit of a softmax decides: probabilities this near to it may go either way.
BOUNDARY = 1e-6

seeds = st.integers(0, 2**32 - 1)
shares = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.95, 1.0]), st.floats(0, 1))


def random_logits(seed: int, vocabulary: int = 0) -> np.ndarray:
    """Of some spread, with equal values among them and with tokens that are ruled out."""
    rng = np.random.default_rng(seed)
    size = vocabulary or int(rng.integers(1, 400))
    values = (rng.normal(size=size) * rng.choice([0.1, 1, 5, 20])).astype(np.float32)
    if rng.random() < 0.3:
        values = np.round(values)
    if rng.random() < 0.2:
        values[rng.random(size) < 0.5] = -np.inf
        values[int(rng.integers(size))] = 1.0
    return values


def theirs(processor: object, scores: np.ndarray, seen: list[int] | None = None) -> np.ndarray:
    ids = torch.tensor([seen or [0]])
    found = processor(ids, torch.from_numpy(scores.copy())[None])  # type: ignore[operator]
    result: np.ndarray = found[0].numpy()
    return result


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    result: np.ndarray = weights / weights.sum()
    return result


@given(seed=seeds, penalty=st.floats(0.1, 3))
def test_repetition_penalty_is_bit_equal(seed: int, penalty: float) -> None:
    logits = random_logits(seed)
    seen = np.unique(np.random.default_rng(seed).integers(0, len(logits), 20))
    processor = process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = theirs(processor, logits, seen.tolist() * 2)
    np.testing.assert_array_equal(penalise(logits, seen, penalty), expected)


@given(seed=seeds, k=st.integers(1, 500))
def test_top_k_is_bit_equal(seed: int, k: int) -> None:
    logits = random_logits(seed)
    expected = theirs(process.TopKLogitsWarper(k), logits)
    np.testing.assert_array_equal(keep_top_k(logits, k), expected)


@given(seed=seeds, p=shares)
def test_top_p_keeps_the_same_tokens(seed: int, p: float) -> None:
    logits = random_logits(seed)
    found, expected = keep_top_p(logits, p), theirs(process.TopPLogitsWarper(p), logits)
    # Sorted, as torch's sort says nothing of which comes first among equals.
    clear = np.abs(np.cumsum(np.sort(softmax(logits))) - (1 - p)) > BOUNDARY
    clear[-1] = True
    np.testing.assert_array_equal(np.sort(found)[clear], np.sort(expected)[clear])
    assert np.isin(found, [-np.inf, *logits]).all()
    assert (found > -np.inf).any()


@given(seed=seeds, p=shares)
def test_min_p_keeps_the_same_tokens(seed: int, p: float) -> None:
    logits = random_logits(seed)
    found, expected = keep_min_p(logits, p), theirs(process.MinPLogitsWarper(p), logits)
    probabilities = softmax(logits)
    clear = np.abs(probabilities - p * probabilities.max()) > BOUNDARY * probabilities.max()
    np.testing.assert_array_equal(found[clear], expected[clear])
    assert found[logits.argmax()] == logits.max()


@settings(deadline=None)
@given(
    seed=seeds,
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_they_are_applied_in_the_order_of_generate(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """The list of processors is the one transformers' own `generate` makes of a config."""
    from transformers import GenerationConfig, GenerationMixin, LlamaConfig

    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=1.3,
        num_beams=1,
    )

    class Model(GenerationMixin):
        def __init__(self) -> None:
            self.config = LlamaConfig()

    processors = Model()._get_logits_processor(config, input_ids_seq_length=3)
    logits, seen = random_logits(seed, 200), np.array([1, 4, 7])
    expected = theirs(processors, logits, seen.tolist())
    found = Warping(top_k, top_p, min_p).apply(penalise(logits, seen, 1.3), temperature)
    # The same scores to the bit, but for one token at a boundary. (Sorted: see top-p above.)
    found, expected = np.sort(found), np.sort(expected)
    assert (found != expected).sum() <= 1
    assert found[-1] == expected[-1] > -np.inf


def test_only_what_is_kept_is_drawn() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=1000).astype(np.float32)
    kept = set(np.argsort(logits)[-5:].tolist())
    sampler = Sampler(1.0, 3, warping=Warping(top_k=5))
    drawn = [sampler.pick(logits) for _ in range(400)]
    assert set(drawn) == kept
    # As often as their probabilities say.
    shares = softmax(np.where(np.isin(np.arange(1000), list(kept)), logits, -np.inf))
    for token in kept:
        assert drawn.count(token) / 400 == pytest.approx(shares[token], abs=0.08)


def test_a_uniform_of_zero_draws_nothing_that_is_left_out() -> None:
    """The generator can give exactly 0, which is below any sum of weights."""
    sampler = Sampler(1.0, 1, warping=Warping(top_k=1))
    sampler._lcg.next = lambda: 0.0  # type: ignore[method-assign]
    assert sampler.pick(np.array([0, 3, 1], dtype=np.float32)) == 1


def test_plain_temperature_is_what_it_was() -> None:
    """Knobs that keep everything do not change the peer's stream."""
    logits = np.random.default_rng(1).normal(size=(50, 100)).astype(np.float32)
    plain, idle = Sampler(0.7, 9), Sampling(0.7, 0, 1.0, 0.0, 1.0, 9).sampler(Generation())
    assert [plain.pick(row) for row in logits] == [idle.pick(row) for row in logits]


def test_the_penalty_counts_the_prompt_and_what_was_picked() -> None:
    logits = np.array([1.0, 1.2, 1.1, -3.0], dtype=np.float32)
    sampler = Sampler(repetition_penalty=2.0)
    sampler.see([1])
    assert [sampler.pick(logits) for _ in range(3)] == [2, 0, 1]


def test_defaults_come_from_the_package_and_bad_values_are_refused() -> None:
    package = Generation(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=1.5)
    logits = np.random.default_rng(2).normal(size=(40, 30)).astype(np.float32)
    given = Sampling(0.5, 3, 0.5, None, 1.5).sampler(Generation())
    found = Sampling().sampler(package)
    assert [found.pick(row) for row in logits] == [given.pick(row) for row in logits]
    for bad, message in [
        (Sampling(top_k=-1), "top_k"),
        (Sampling(top_p=1.5), "top_p"),
        (Sampling(min_p=math.nan), "min_p"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty"),
        (Sampling(repetition_penalty=math.inf), "repetition_penalty"),
        (Sampling(temperature=math.nan), "temperature"),
        (Sampling(temperature=0.0, top_k=5), "no effect"),
    ]:
        with pytest.raises(InputError, match=message):
            bad.sampler(package)
