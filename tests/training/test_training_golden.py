"""Whole training runs against the peer's traces.

In float64: losses 1e-6 relative (lm_train, whose loss falls to 1e-4 where the peer's float32
logits round, 1e-5), weights 1e-5 absolute. Measured: 6e-6 and 2e-6 for lm_train, about 1e-7
and 5e-7 for the others. In float32 weights agree to 1e-5 as well. With mixed precision the last
bit of a gradient can decide how its half is cut: weights 1e-4.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evermind_exporters.checkpoints import read_checkpoint

from evermind_pack.models import EvermindLM, LimbicModel, SharedExpertMoE, generate
from evermind_pack.training import (
    LimbicBatch,
    LimbicTrainer,
    LimbicTrainerOptions,
    LmTrainer,
    LmTrainerOptions,
    MoeBatch,
    MoeTrainer,
    MoeTrainerOptions,
    PeerMixedTrainer,
)
from tests.packages import GOLDEN

RENAMED = {
    "learningRate": "lr",
    "weightDecay": "weight_decay",
    "auxWeight": "aux_weight",
    "batchSize": "batch_size",
    "accumSteps": "batch_size",
    "maxGradNorm": "max_grad_norm",
}
MOE = ["moe_train_full", "moe_train_mini"]
LIMBIC = ["limbic_train", "limbic_train_decay"]
LM = ["lm_train", "lm_train_accum"]
MIXED = "lm_train_mixed"
# Recomputed activations give the same bits; mixed precision is a trainer of its own.
NOT_OPTIONS = ("checkpoint", "mixedPrecision")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@dtypes
@pytest.mark.parametrize("name", MOE)
def test_moe(golden, name, dtype):
    case = golden(name)
    trainer, samples = _moe(case, dtype)
    history = trainer.train(samples)
    assert trainer.steps == case.json["optimizer_steps"]
    expected = case.json["history_f64"]
    assert [e.loss for e in history] == pytest.approx([e["loss"] for e in expected], rel=1e-6)
    assert [e.aux_loss for e in history] == pytest.approx(
        [e["auxLoss"] for e in expected], rel=1e-6
    )
    _same_weights(trainer.model, case)


@pytest.mark.parametrize("name", MOE)
def test_moe_first_gradient(golden, name):
    case = golden(name)
    trainer, samples = _moe(case, torch.float64)
    size = trainer.options.batch_size or len(samples.x)
    first = MoeBatch(samples.x[:size], samples.target[:size])
    trainer.losses(first).total.backward()
    _same_gradient(trainer.model, case)

    # With the balancing loss scaled as it should be, the router's gradient is another.
    trainer.model.zero_grad()
    trainer.options = MoeTrainerOptions(aux_weight=1.0)
    trainer.losses(first).total.backward()
    with pytest.raises(AssertionError):
        _same_gradient(trainer.model, case)


@dtypes
@pytest.mark.parametrize("name", LIMBIC)
def test_limbic(golden, name, dtype):
    case = golden(name)
    rows = case.json["samples"]
    samples = LimbicBatch(
        *(np.array([r[key] for r in rows]) for key in ("input", "state", "deltaTarget", "reward"))
    )
    model = LimbicModel(case.json["config"]).to(dtype)
    trainer = LimbicTrainer(model, LimbicTrainerOptions(**_options(case.json["options"])))
    assert trainer.evaluate(samples) == pytest.approx(case.json["evaluate_before_f64"], rel=1e-6)
    history = trainer.train(samples)
    assert [r.loss for r in history] == pytest.approx(case.json["losses_f64"], rel=1e-6)
    assert [r.grad_norm for r in history] == pytest.approx(case.json["grad_norms_f64"], rel=1e-5)
    if "second_call_options" in case.json:
        trainer.options = LimbicTrainerOptions(**_options(case.json["second_call_options"]))
        again = trainer.train(samples)
        assert [r.loss for r in again] == pytest.approx(
            case.json["second_call_losses_f64"], rel=1e-6
        )
    assert trainer.evaluate(samples) == pytest.approx(case.json["evaluate_after_f64"], rel=1e-6)
    _same_weights(model, case)


@dtypes
@pytest.mark.parametrize(("name", "tolerance"), [*zip(LM, [1e-5, 1e-6], strict=True)])
def test_lm(golden, name, tolerance, dtype):
    case = golden(name)
    trainer = _lm(case, dtype)
    history = trainer.train(case.json["sequences"])
    assert trainer.steps == case.json["optimizer_steps"]
    if dtype == torch.float32:
        tolerance = 2e-4
    assert history == pytest.approx(case.json["history_f64"], rel=tolerance)
    _same_weights(trainer.model, case)
    greedy = case.json["greedy_after"]
    tokens = generate(trainer.model, greedy["prompt"], max_new_tokens=greedy["max_new_tokens"])
    assert tokens == greedy["tokens"]


@pytest.mark.parametrize("name", LM)
def test_lm_first_gradient(golden, name):
    case = golden(name)
    trainer = _lm(case, torch.float64)
    usable = [sequence for sequence in case.json["sequences"] if len(sequence) >= 2]
    trainer.losses(usable[: trainer.options.batch_size]).total.backward()
    _same_gradient(trainer.model, case)


@dtypes
def test_lm_mixed_precision(golden, dtype):
    case = golden(MIXED)
    trainer = _lm(case, dtype, PeerMixedTrainer)
    history = trainer.train(case.json["sequences"])
    assert trainer.steps == case.json["optimizer_steps"]
    assert history == pytest.approx(case.json["history_f64"], rel=1e-6)
    scaler = case.json["loss_scaler"]
    assert trainer.scaler.scale == scaler["scale"]
    assert trainer.scaler.overflows == scaler["overflows"] == scaler["skipped"]
    _same_weights(trainer.model, case, tolerance=1e-4)


def test_lm_mixed_precision_first_gradient(golden):
    case = golden(MIXED)
    first = case.json["sequences"][:1]
    trainer = _lm(case, torch.float64, PeerMixedTrainer)
    trainer.step(first)
    _same_gradient(trainer.model, case)

    # Rounded to half it is another than without.
    plain = _lm(case, torch.float64)
    plain.step(first)
    with pytest.raises(AssertionError):
        _same_gradient(plain.model, case)


def test_every_trace_is_used():
    cases = json.loads((GOLDEN / "index.json").read_text("utf-8"))["cases"]
    traces = {case["id"] for case in cases if case["kind"].endswith("_train")}
    assert traces == {*MOE, *LIMBIC, *LM, MIXED}


def _moe(case, dtype) -> tuple[MoeTrainer, MoeBatch]:
    options = MoeTrainerOptions(aux_scale="peer", **_options(case.json["options"]))
    trainer = MoeTrainer(SharedExpertMoE(case.json["config"]).to(dtype), options)
    rows = case.json["samples"]
    return trainer, MoeBatch(*(np.array([row[key] for row in rows]) for key in ("input", "target")))


def _lm(case, dtype, trainer_type=LmTrainer) -> LmTrainer:
    given = {k: v for k, v in case.json["options"].items() if k not in NOT_OPTIONS}
    options = LmTrainerOptions(aux_weight=0.0, **_options(given))
    return trainer_type(EvermindLM(case.json["config"]).to(dtype), options)


def _options(given: dict[str, float]) -> dict[str, float]:
    return {RENAMED.get(key, key): value for key, value in given.items()}


def _same_weights(model, case, tolerance=1e-5) -> None:
    expected = read_checkpoint(case.bytes("final.v1.bin"), "final").tensors
    for name, value in model.to_tensors().items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=tolerance, err_msg=name)


def _same_gradient(model, case) -> None:
    gradients = type(model).from_tensors(model.config, model.to_tensors()).double()
    for target, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
        target.data = parameter.grad.double()
    flat = np.concatenate([value.ravel() for value in gradients.to_tensors().values()])
    expected = case.array("grad_step1.f32")
    np.testing.assert_allclose(flat, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
