"""Initial weights, forward and gradients of the torch models against the golden cases.

Tolerances are absolute, relative to the largest expected value of the array: 1e-6 for
float64 maths against the peer's float32 values (their own rounding is 6e-8), 1e-5 for
float32 maths. Routes and greedy or sampled tokens are exact.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from evermind_exporters.checkpoints import (
    read_checkpoint,
    validate_config,
    write_evl0,
    write_lmbc,
    write_moe0,
)
from evermind_exporters.checkpoints.checkpoint import Checkpoint

from evermind_pack.models import (
    MODELS,
    EvermindLM,
    SharedExpertMoE,
    generate,
    initial_tensors,
    reference,
)

PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-5)]
precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)

WRITERS = {"moe": write_moe0, "lm": write_evl0, "limbic": write_lmbc}
FAMILIES = {"moe": "shared-expert-moe", "lm": "evermind-lm", "limbic": "limbic"}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("moe_default", "moe"),
        ("moe_small", "moe"),
        ("lm_init", "lm"),
        ("lm_default", "lm"),
        ("limbic_default", "limbic"),
    ],
)
def test_initial_weights_are_the_peers_bytes(golden, case, kind):
    case = golden(case)
    assert case.json["weights_are_initial"]
    family = FAMILIES[kind]
    config = validate_config(family, case.json["config"])
    data = WRITERS[kind](Checkpoint(family, config, initial_tensors(family, config)))
    stored = case.json["files"] | case.json.get("digests", {})
    assert hashlib.sha256(data).hexdigest() == stored[f"{kind}.v1.bin"]["sha256"]
    model = MODELS[family](case.json["config"])
    assert _bytes(model.to_tensors()) == _bytes(initial_tensors(family, config))


@pytest.mark.parametrize(
    ("case", "kind"),
    [("moe_train_full", "moe"), ("lm_train", "lm"), ("limbic_train_decay", "limbic")],
)
def test_training_cases_start_from_initial_weights(golden, case, kind):
    case = golden(case)
    family = FAMILIES[kind]
    config = validate_config(family, case.json["config"])
    data = WRITERS[kind](Checkpoint(family, config, initial_tensors(family, config)))
    assert data == case.bytes("init.v1.bin")


@precisions
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["moe_small", "moe_six", "moe_default"])
def test_moe_forward(golden, name, version, dtype, tolerance):
    case = golden(name)
    if name == "moe_default" and version == 1:
        model = SharedExpertMoE(case.json["config"])
    else:
        model = _load(case, f"moe.v{version}.bin")
    model = model.to(dtype)
    x = torch.tensor(_padded(case.json["inputs"], model.config["modelDim"])).to(dtype)
    out = model(x)
    expected = case.json["expected_f32" if version == 1 else "expected_fp16"]
    # moe_six ends with an all-zero input: a full tie, decided by the lower index.
    assert out.experts.tolist() == [row["experts"] for row in expected]
    _close(out.y, [row["output"] for row in expected], tolerance)
    _close(out.gates, [row["gates"] for row in expected], tolerance)
    _close(out.probs, [row["probs"] for row in expected], tolerance)


@precisions
@pytest.mark.parametrize("name", ["moe_small", "moe_six", "moe_default"])
def test_moe_gradients(golden, name, dtype, tolerance):
    case = golden(name)
    backward = case.json["backward"]
    stored = name != "moe_default"
    model = _load(case, "moe.v1.bin") if stored else SharedExpertMoE(case.json["config"])
    model = model.to(dtype)
    row = case.json["inputs"][backward["input_index"]]
    x = torch.tensor(_padded([row], model.config["modelDim"])).to(dtype).requires_grad_()
    model(x).y.backward(torch.tensor([backward["d_output"]], dtype=dtype))
    _close(x.grad, [backward["d_input"]], tolerance)
    if stored:
        _close(_flat_gradients(model), case.array("grad.f32"), tolerance)


@precisions
@pytest.mark.parametrize("name", ["lm_small", "lm_init", "lm_default", "lm_trained"])
def test_lm_forward(golden, name, dtype, tolerance):
    case = golden(name)
    model = _lm(case).to(dtype)
    for forward in case.json["forward"]:
        logits, routes = model(torch.tensor([forward["tokens"]], dtype=torch.int64))
        _close(logits[0], forward["logits"], tolerance)
        assert len(routes) == len(forward["routes"]) == model.config["numLayers"]
        for taken, expected in zip(routes, forward["routes"], strict=True):
            assert taken.experts[0].tolist() == [route["experts"] for route in expected]
            _close(taken.gates[0], [route["gates"] for route in expected], tolerance)


@precisions
@pytest.mark.parametrize("name", ["lm_small", "lm_init"])
def test_lm_forward_of_the_half_checkpoint(golden, name, dtype, tolerance):
    case = golden(name)
    model = _load(case, "lm.v2.bin").to(dtype)
    for forward in case.json["forward"]:
        if "logits_fp16" in forward:
            logits, _ = model(torch.tensor([forward["tokens"]]))
            _close(logits[0], forward["logits_fp16"], tolerance)


@precisions
@pytest.mark.parametrize("name", ["lm_small", "lm_init", "lm_trained"])
def test_lm_gradients(golden, name, dtype, tolerance):
    case = golden(name)
    backward = case.json["backward"]
    model = _lm(case).to(dtype)
    tokens = torch.tensor([backward["tokens"]])
    logits = model(tokens).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    loss.backward()
    # lm_trained is nearly certain: its small loss and gradients are differences of numbers
    # near 1, which the peer (and float32 maths) rounds, so the scale there is 1.
    scale = 1.0 if name == "lm_trained" else None
    assert loss.item() == pytest.approx(backward["loss_f64"], rel=tolerance, abs=tolerance)
    _close(_flat_gradients(model), case.array("grad.f32"), tolerance, scale)


def test_lm_gradients_where_only_a_digest_is_stored(golden):
    # The digest covers float32 bits that float64 maths in another order need not meet; the
    # loss is what can be compared.
    case = golden("lm_default")
    model = _lm(case).double()
    tokens = torch.tensor([case.json["backward"]["tokens"]])
    loss = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
    assert loss.item() == pytest.approx(case.json["backward"]["loss_f64"], rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["lm_small", "lm_init", "lm_default", "lm_trained"])
def test_generation_gives_the_peers_tokens(golden, name, dtype):
    case = golden(name)
    model = _lm(case).to(dtype)
    for greedy in case.json["greedy"]:
        # Greedy, among others from the empty prompt.
        tokens = generate(model, greedy["prompt"], max_new_tokens=greedy["max_new_tokens"])
        assert tokens == greedy["tokens"]
    for sampled in case.json["sampled"]:
        tokens = generate(
            model,
            sampled["prompt"],
            max_new_tokens=sampled["max_new_tokens"],
            temperature=sampled["temperature"],
            seed=sampled.get("seed"),
            stop_token=sampled.get("stop_token"),
        )
        assert tokens == sampled["tokens"]


@pytest.mark.parametrize("name", ["lm_small", "lm_init", "lm_default"])
def test_generation_of_the_half_checkpoint(golden, name):
    case = golden(name)
    greedy = case.json["greedy_fp16"]
    model = _load(case, "lm.v2.bin")
    tokens = generate(model, greedy["prompt"], max_new_tokens=greedy["max_new_tokens"])
    assert tokens == greedy["tokens"]


@precisions
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["limbic_small", "limbic_default"])
def test_limbic_forward(golden, name, version, dtype, tolerance):
    case = golden(name)
    model = _load(case, f"limbic.v{version}.bin").to(dtype)
    steps = case.json["steps_f32" if version == 1 else "steps_fp16"]
    columns = [
        torch.tensor([step[key] for step in steps], dtype=dtype)
        for key in ("x", "hidden_in", "state_in")
    ]
    out = model(*columns)
    _close(out.hidden, [step["hidden"] for step in steps], tolerance)
    _close(out.delta, [step["delta"] for step in steps], tolerance)
    _close(out.reward, [step["reward_f64"] for step in steps], tolerance)


@precisions
@pytest.mark.parametrize("name", ["limbic_small", "limbic_default"])
def test_limbic_gradients(golden, name, dtype, tolerance):
    case = golden(name)
    step = case.json["backward"]
    config = case.json["resolved_config"]
    model = _load(case, "limbic.v1.bin").to(dtype)
    out = model(*(torch.tensor([step[key]], dtype=dtype) for key in ("x", "hidden_in", "state_in")))
    target = torch.tensor(step["delta_target_f64"], dtype=dtype)
    reward_error = out.reward - step["reward_target_f64"]
    loss = 0.5 * (out.delta - target).square().sum()
    loss = loss + 0.5 * config["rewardWeight"] * reward_error.square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(step["loss_f64"], rel=tolerance)
    _close(_flat_gradients(model), case.array("grad.f32"), tolerance)


def test_reference_names_outputs_as_a_plan_does(golden):
    case = golden("lm_small")
    forward = case.json["forward"][0]
    outputs = reference(_lm(case), {"tokens": np.array(forward["tokens"])})
    assert list(outputs) == ["logits", "ids.0", "gates.0", "ids.1", "gates.1"]
    assert outputs["logits"].dtype == np.float32
    assert outputs["ids.1"].dtype == np.int64
    _close(outputs["logits"], forward["logits"], 1e-6)

    case = golden("moe_small")
    x = _padded(case.json["inputs"], 8)
    outputs = reference(_load(case, "moe.v1.bin"), {"x": x})
    assert list(outputs) == ["y", "ids.0", "gates.0"]
    _close(outputs["y"], [row["output"] for row in case.json["expected_f32"]], 1e-6)

    case = golden("limbic_small")
    steps = case.json["steps_f32"]
    names = {"x": "x", "hidden": "hidden_in", "state": "state_in"}
    inputs = {name: np.array([step[key] for step in steps]) for name, key in names.items()}
    outputs = reference(_load(case, "limbic.v1.bin"), inputs)
    assert list(outputs) == ["hidden", "delta", "reward"]
    assert outputs["reward"].shape == (len(steps),)
    _close(outputs["delta"], [step["delta"] for step in steps], 1e-6)


def _load(case, name):
    checkpoint = read_checkpoint(case.bytes(name), name)
    config = case.json["resolved_config"]
    return MODELS[checkpoint.family].from_tensors(config, checkpoint.tensors)


def _lm(case) -> EvermindLM:
    stored = (case.folder / "lm.v1.bin").exists()
    return _load(case, "lm.v1.bin") if stored else EvermindLM(case.json["config"])


def _padded(rows: list[list[float]], width: int) -> np.ndarray:
    """The peer fills short inputs with zeros and ignores what is too long."""
    x = np.zeros((len(rows), width), dtype=np.float32)
    for target, row in zip(x, rows, strict=True):
        target[: len(row)] = row[:width]
    return x


def _flat_gradients(model) -> np.ndarray:
    """All gradients in canonical order, as the golden files join them."""
    gradients = type(model).from_tensors(model.config, model.to_tensors()).double()
    for target, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
        target.data = parameter.grad.double()
    return np.concatenate([value.ravel() for value in gradients.to_tensors().values()])


def _close(found, expected, tolerance: float, scale: float | None = None) -> None:
    expected = np.asarray(expected, dtype=np.float64)
    found = np.asarray(found.detach() if isinstance(found, torch.Tensor) else found)
    assert found.shape == expected.shape
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def _bytes(tensors: dict[str, np.ndarray]) -> list[tuple[str, bytes]]:
    return [(name, value.tobytes()) for name, value in tensors.items()]
