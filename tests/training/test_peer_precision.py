"""The peer's mixed precision: its own runs, its definition written out, and what is refused.

`peer_mixed_accum.json` was recorded from the peer: runs with accumulation, many of whose steps
overflow. Measured against them: losses 4e-6 relative, in float64 and in float32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evermind_manifests.errors import ConfigError
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from evermind_pack.models import EvermindLM
from evermind_pack.training import (
    LmTrainer,
    LmTrainerOptions,
    PeerLossScaler,
    PeerMixedTrainer,
    RunFolder,
    run_training,
)
from evermind_pack.training.peer_precision import through_half

RECORDED = json.loads((Path(__file__).parent / "peer_mixed_accum.json").read_text("utf-8"))
SCALER_NAMES = {
    "initScale": "initial_scale",
    "growthFactor": "growth_factor",
    "backoffFactor": "backoff_factor",
    "growthInterval": "growth_interval",
    "minScale": "min_scale",
}
WINDOW = RECORDED["sequences"][:3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("run", RECORDED["runs"], ids=["accumulate 3", "accumulate 2"])
def test_the_peers_own_runs_with_accumulation(run, dtype):
    given = run["options"]
    trainer = PeerMixedTrainer(
        EvermindLM(RECORDED["config"]).to(dtype),
        LmTrainerOptions(
            aux_weight=0.0,
            lr=given["lr"],
            weight_decay=given["weightDecay"],
            batch_size=given["accumSteps"],
        ),
        PeerLossScaler(**{SCALER_NAMES[k]: v for k, v in run["mixedPrecision"].items()}),
    )
    for epoch in run["epochs"]:
        [loss] = trainer.train(RECORDED["sequences"])
        assert loss == pytest.approx(epoch["loss"], rel=1e-5)
        assert trainer.scaler.scale == epoch["scale"]
        assert trainer.scaler.overflows == epoch["overflows"] == epoch["skipped"]


def test_the_definition_written_out():
    lr, decay, steps = 0.02, 0.1, 24
    trainer = _trainer(PeerLossScaler(growth_interval=3), lr=lr, weight_decay=decay)
    weights = _weights(trainer)
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    scale, streak, t, skipped = 16384.0, 0, 0, 0
    for _ in range(steps):
        factor, gradient = scale, np.zeros(len(weights), np.float32)
        for sequence in WINDOW:
            gradient = gradient + _gradient(weights, sequence)
            # The quirk: everything gathered so far, not this sequence's part.
            gradient = (gradient.astype(np.float64) * factor).astype(np.float32)
        gradient = (gradient.astype(np.float64) * (1 / 3)).astype(np.float32)
        gradient = np.array([_half(value) for value in gradient])
        if np.isfinite(gradient).all():
            streak += 1
            if streak == 3:
                scale, streak = scale * 2, 0
            g = (gradient / factor).astype(np.float32).astype(np.float64)
            t += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            update = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            weights = weights - lr * (update + decay * weights)
        else:
            scale, streak, skipped = max(1.0, scale * 0.5), 0, skipped + 1
        trainer.step(WINDOW)
        assert (trainer.scaler.scale, trainer.scaler.overflows, trainer.steps) == (
            scale,
            skipped,
            t,
        )
        np.testing.assert_allclose(_weights(trainer), weights, rtol=0, atol=1e-9)
    # Both happened more than once, or this showed little.
    assert skipped > 10
    assert t > 10


def test_accumulation_weighs_the_first_sequence_most():
    # Far from overflow the step goes along W^2 g1 + W g2 + g3, over 3.
    trainer = _trainer(PeerLossScaler(initial_scale=8.0))
    weights = _weights(trainer)
    first, second, third = (_gradient(weights, sequence) for sequence in WINDOW)
    trainer.step(WINDOW)
    found = parameters_to_vector([p.grad for p in trainer.model.parameters()]).numpy()
    expected = (64 * first + 8 * second + third) / 3
    # A half has 11 bits; below 2^-14, scaled, a fixed step of 2^-24.
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=2**-24 / 8)


def test_products_are_stored_to_the_last_bit_as_the_peers():
    # With a scale that is no power of two, a float32 product would round differently.
    trainer = _trainer(PeerLossScaler(initial_scale=3000.0))
    gradient = _gradient(_weights(trainer), WINDOW[0])
    trainer.step(WINDOW[:1])
    scaled = (gradient.astype(np.float64) * 3000).astype(np.float32)
    halves = np.array([_half(value) for value in scaled])
    expected = (halves * (1 / 3000)).astype(np.float32)
    found = parameters_to_vector([p.grad for p in trainer.model.parameters()]).numpy()
    np.testing.assert_array_equal(found, expected)


def test_halves_are_the_peers(golden):
    case = golden("fp16")
    with np.errstate(invalid="ignore"):
        halves = through_half(case.array("encode_in.f32")).astype(np.float16)
    expected = case.array("encode_out.u16", "<u2").view(np.float16)
    np.testing.assert_array_equal(halves, expected)
    assert np.isinf(expected[np.isfinite(case.array("encode_in.f32"))]).any()


def test_an_overflow_skips_the_step_and_says_so():
    trainer = _trainer(PeerLossScaler(initial_scale=8.0))
    trainer.step(WINDOW)
    before = trainer.model.to_tensors(), _copied(trainer.optimizer_tensors())
    trainer.scaler = PeerLossScaler()
    report = trainer.step(WINDOW)
    assert report.step == trainer.steps == 1
    assert not math.isfinite(report.grad_norm)
    assert report.loss == pytest.approx(
        LmTrainer(trainer.model, trainer.options).evaluate([WINDOW])
    )
    assert trainer.scaler.overflows == 1
    after = trainer.model.to_tensors(), trainer.optimizer_tensors()
    for old, new in zip(before, after, strict=True):
        assert all(np.array_equal(old[name], new[name]) for name in old | new)


def test_the_scale_grows_after_a_clean_streak_and_backs_off_to_its_floor():
    scaler = PeerLossScaler(initial_scale=8, growth_interval=3, min_scale=3)
    seen = []
    for overflow in (False, False, True, False, False, False, True, True, False):
        scaler.update(overflow)
        seen.append(scaler.scale)
    assert seen == [8, 8, 4, 4, 4, 8, 4, 3, 3]
    assert scaler.overflows == 3
    default = PeerLossScaler()
    for _ in range(199):
        default.update(False)
    assert default.scale == 16384
    default.update(False)
    assert default.scale == 32768


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"initial_scale": math.inf}, "initial_scale"),
        ({"initial_scale": 4.0, "min_scale": 8.0}, "initial_scale"),
        ({"growth_factor": 0.5}, "growth_factor"),
        ({"backoff_factor": 1.5}, "backoff_factor"),
        ({"backoff_factor": math.nan}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"min_scale": 0.0}, "min_scale"),
    ],
)
def test_scalers_that_cannot_be_are_refused(given, named):
    with pytest.raises(ConfigError, match=f"{named}: expected"):
        PeerLossScaler(**given)


def test_balancing_is_refused_as_the_peer_has_none():
    with pytest.raises(ConfigError, match="aux_weight: expected 0"):
        _trainer(aux_weight=0.01).step(WINDOW)


def test_run_folders_refuse_it_before_the_first_step(tmp_path):
    trainer = PeerMixedTrainer(EvermindLM(RECORDED["config"]), LmTrainerOptions(aux_weight=0.0))
    run = RunFolder.create(tmp_path / "run", trainer.model)
    with pytest.raises(ConfigError, match="expected LmTrainer, found PeerMixedTrainer"):
        run_training(run, trainer, lambda _: WINDOW, steps=3, plan={})
    with pytest.raises(ConfigError, match="PeerMixedTrainer"):
        run.save(trainer, {})
    assert trainer.steps == 0
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


def _trainer(scaler: PeerLossScaler | None = None, **options) -> PeerMixedTrainer:
    given = LmTrainerOptions(**{"aux_weight": 0.0, **options})
    return PeerMixedTrainer(EvermindLM(RECORDED["config"]).double(), given, scaler)


def _weights(trainer: PeerMixedTrainer) -> np.ndarray:
    return parameters_to_vector(trainer.model.parameters()).detach().numpy()


def _gradient(weights: np.ndarray, sequence: list[int]) -> np.ndarray:
    """One sequence's gradient at these weights, float32."""
    model = EvermindLM(RECORDED["config"]).double()
    vector_to_parameters(torch.from_numpy(weights), model.parameters())
    LmTrainer(model, LmTrainerOptions(aux_weight=0.0)).losses([sequence]).total.backward()
    return parameters_to_vector([p.grad for p in model.parameters()]).float().numpy()


def _half(value: np.float32) -> float:
    """The table of specs/evermind-formats.md, section 3, for finite and infinite values."""
    magnitude = abs(float(value))
    if magnitude >= 65536:
        return math.copysign(math.inf, value)
    if magnitude == 0:
        return 0.0
    # Ten bits after the leading one, fewer below 2^-14.
    unit = 2.0 ** (max(math.frexp(magnitude)[1] - 1, -14) - 10)
    return math.copysign(math.floor(magnitude / unit) * unit, value)


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
