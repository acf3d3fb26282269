"""What the golden cases do not show: state dicts, batches, ties, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evermind_exporters.checkpoints import canonical_shapes
from evermind_manifests.errors import CheckpointError, ConfigError, InputError

from evermind_pack.models import MODELS, EvermindLM, SharedExpertMoE, generate, reference

CONFIGS = {
    "shared-expert-moe": {"modelDim": 6, "hiddenDim": 5, "numExperts": 3, "topK": 2},
    "evermind-lm": {"vocabSize": 11, "dModel": 6, "numLayers": 2, "hiddenDim": 5, "numExperts": 3},
    "limbic": {"inputDim": 4, "hiddenDim": 3},
}
LM = CONFIGS["evermind-lm"]


@pytest.mark.parametrize("family", CONFIGS)
def test_state_dict_is_the_canonical_list(family):
    model = MODELS[family](CONFIGS[family])
    shapes = canonical_shapes(family, model.config)
    assert [(name, tuple(value.shape)) for name, value in model.state_dict().items()] == [
        *shapes.items()
    ]
    again = MODELS[family]({**CONFIGS[family], "seed": 5})
    again.load_state_dict(model.state_dict())
    for name, value in again.to_tensors().items():
        assert value.tobytes() == model.to_tensors()[name].tobytes()


@pytest.mark.parametrize("family", CONFIGS)
def test_from_tensors_copies_and_refuses_what_does_not_fit(family):
    model = MODELS[family](CONFIGS[family])
    tensors = model.to_tensors()
    for value in tensors.values():
        value.setflags(write=False)
    first = next(iter(tensors))
    loaded = MODELS[family].from_tensors(CONFIGS[family], tensors)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter += 1
    assert model.to_tensors()[first].tobytes() == tensors[first].tobytes()
    name = list(tensors)[-1]
    for wrong in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: np.zeros((2, 9), dtype=np.float32)},
        tensors | {"experts.0.extra": np.zeros(1, dtype=np.float32)},
    ):
        with pytest.raises(CheckpointError, match=r"experts\.0\.extra|" + name):
            MODELS[family].from_tensors(CONFIGS[family], wrong)
    with pytest.raises(ConfigError):
        MODELS[family]({**CONFIGS[family], "hiddenDim": 0})


def test_state_dict_shares_memory_and_reaches_the_stacked_experts():
    model = SharedExpertMoE(CONFIGS["shared-expert-moe"])
    with torch.no_grad():
        model.state_dict()["experts.1.w1"].fill_(7)
    assert model.experts.w1[1].eq(7).all()
    assert not model.experts.w1[0].eq(7).any()


def test_the_peers_own_names_are_accepted():
    config = CONFIGS["shared-expert-moe"]
    tensors = SharedExpertMoE({**config, "seed": 9}).to_tensors()
    renamed = {
        name.replace("router.weight", "wr").replace("experts.", "expert"): value
        for name, value in tensors.items()
    }
    assert "wr" in renamed
    assert "expert2.b1" in renamed
    loaded = SharedExpertMoE.from_tensors(config, renamed).to_tensors()
    assert {name: value.tobytes() for name, value in loaded.items()} == {
        name: value.tobytes() for name, value in tensors.items()
    }


def test_ties_go_to_the_lower_index_even_below_float32_resolution():
    model = SharedExpertMoE({"modelDim": 2, "hiddenDim": 2, "numExperts": 4, "topK": 3}).double()
    tiny = 2.0**-30
    with torch.no_grad():
        model.router.weight.copy_(torch.tensor([[1, 0], [1, tiny], [2, 0], [1, 2 * tiny]]))
    out = model(torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]], dtype=torch.float64))
    # 1 + 2^-30 rounds to 1 as float32, so experts 0, 1 and 3 tie.
    assert out.experts.tolist() == [[2, 0, 1], [0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize("top_k", [1, 3])
def test_dispatch_equals_running_every_expert(top_k):
    torch.manual_seed(0)
    config = {"modelDim": 6, "hiddenDim": 5, "numExperts": 3, "topK": top_k}
    model = SharedExpertMoE(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    x = torch.randn(40, 6, dtype=torch.float64)
    out = model(x)
    t = model.state_dict()
    expected = _dense_ffn(t, "shared", x)
    for expert in range(3):
        gate = (out.gates * (out.experts == expert)).sum(1, keepdim=True)
        expected = expected + gate * _dense_ffn(t, f"experts.{expert}", x)
    torch.testing.assert_close(out.y, expected)


def test_no_tokens_give_no_outputs():
    assert SharedExpertMoE(CONFIGS["shared-expert-moe"])(torch.zeros(0, 6)).y.shape == (0, 6)
    assert EvermindLM(LM)(torch.zeros(1, 0, dtype=torch.int64)).logits.shape == (1, 0, 11)


def test_batches_and_padding_change_nothing():
    model = _perturbed(EvermindLM(LM)).double()
    short, long = [3, 1, 4], [1, 5, 9, 2, 6, 5]
    batch = model(torch.tensor([short + [0] * 3, long]))
    for row, tokens in enumerate((short, long)):
        alone = model(torch.tensor([tokens]))
        torch.testing.assert_close(batch.logits[row, : len(tokens)], alone.logits[0])
        for together, single in zip(batch.routes, alone.routes, strict=True):
            assert together.experts[row, : len(tokens)].tolist() == single.experts[0].tolist()


def test_gradients_reach_every_parameter_and_match_finite_differences():
    torch.manual_seed(1)
    model = _perturbed(EvermindLM({**LM, "numLayers": 1, "topK": 3})).double()
    tokens = torch.tensor([[1, 2, 3, 4]])

    def loss() -> torch.Tensor:
        return model(tokens).logits.square().mean()

    loss().backward()
    for parameter in model.parameters():
        direction = torch.randn_like(parameter)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        slope = ((above - below) / (2 * step)).item()
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5, abs=1e-9)


def test_reference_is_independent_of_the_models_dtype_and_leaves_it_alone():
    model = _perturbed(EvermindLM(LM))
    tokens = np.array([1, 2, 3], dtype=np.int32)
    outputs = reference(model, {"tokens": tokens})
    assert model.token_embedding.weight.dtype == torch.float32
    again = reference(model.double(), {"tokens": tokens})
    assert all(outputs[name].tobytes() == again[name].tobytes() for name in outputs)


@pytest.mark.parametrize(
    ("family", "inputs", "named"),
    [
        ("evermind-lm", {"tokens": np.array([11])}, "tokens"),
        ("evermind-lm", {"tokens": np.array([-1])}, "tokens"),
        ("evermind-lm", {"tokens": np.array([1.0])}, "tokens"),
        ("evermind-lm", {"tokens": np.array([[1]])}, "tokens"),
        ("evermind-lm", {"x": np.array([1])}, "tokens"),
        ("shared-expert-moe", {"x": np.zeros((2, 7))}, r"\(N, 6\)"),
        ("limbic", {"x": np.zeros((2, 4)), "hidden": np.zeros((2, 3))}, "state"),
    ],
)
def test_reference_refuses_inputs_the_model_does_not_take(family, inputs, named):
    with pytest.raises(InputError, match=named):
        reference(MODELS[family](CONFIGS[family]), inputs)


def test_generation_refuses_unknown_tokens():
    with pytest.raises(InputError, match="0 to 10"):
        generate(EvermindLM(LM), [11], max_new_tokens=1)


def _dense_ffn(t: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(x @ t[f"{name}.w1"].T + t[f"{name}.b1"])
    return hidden @ t[f"{name}.w2"].T + t[f"{name}.b2"]


def _perturbed(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model
