"""The Synapse modules in torch compute what the published Python modules do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from evermind_exporters.families.synapse.params import (
    module_of,
    synapse_config,
    synapse_parameters,
    synapse_shapes,
)
from evermind_manifests.errors import ConfigError
from torch import Tensor, nn

from evermind_pack.models.synapse import (
    Expert,
    ExpertPool,
    FastWeights,
    LayerState,
    Mamba,
    MambaState,
    RmsNorm,
    SynapseModel,
    Thalamus,
    Xlstm,
)
from tests.golden_families import FamilyCase, family_case

SINGLE = ("expert", "pool", "mamba", "thalamus", "xlstm", "fast_weights", "model")
CASES = (*SINGLE, "xlstm_b2", "fast_weights_b2", "model_b2")


def load(module: nn.Module, case: FamilyCase, *, half: bool = False) -> Any:
    def stored(name: str, array: Any) -> Tensor:
        tensor = torch.from_numpy(array.copy())
        expert = "w_gate.weight" in name or "w_up" in name or "w_down" in name
        return tensor.half().float() if half and expert and "memory" not in name else tensor

    module.load_state_dict({name: stored(name, array) for name, array in case.weights.items()})
    return module.eval()


def config_of(case: FamilyCase, module: str) -> dict[str, Any]:
    return synapse_config({**case.config, "module": module})


def inputs(case: FamilyCase) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in case.inputs.items()}


def check(case: FamilyCase, found: Mapping[str, Tensor]) -> None:
    case.check({name: tensor.detach().numpy() for name, tensor in found.items()})


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    case = family_case(f"synapse_{name}")
    module = module_of(case.weights)
    assert module is not None
    assert name.startswith(module)
    shapes = synapse_shapes(config_of(case, module))
    assert {key: array.shape for key, array in case.weights.items()} == shapes
    total, _ = synapse_parameters(config_of(case, module))
    assert total == sum(array.size for array in case.weights.values())
    if module == "model":
        assert total == case.expected["real_params"]


def test_counts_at_the_defaults() -> None:
    # specs/synapse.md, section 3.
    assert synapse_parameters(synapse_config({})) == (1_076_297_568, 566_689_632)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"module": "cortex"}, "module"),
        ({"d_model": 0}, "d_model"),
        ({"d_model": True}, "d_model"),
        ({"top_k": 9}, "top_k"),
        ({"d_xlstm_hidden": 30, "n_xlstm_heads": 4}, "d_xlstm_hidden"),
        ({"module": "mamba", "d_model": 8, "d_inner": 12}, "d_inner"),
        ({"module": "xlstm", "d_hidden": 16, "n_heads": 2, "d_head": 4}, "d_hidden"),
        ({"decay": 1.5}, "decay"),
        ({"use_fast_weights": 1}, "use_fast_weights"),
        ({"n_layers": 2**31}, "tensors"),
    ],
)
def test_a_configuration_that_cannot_be(config: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        synapse_config(config)


@torch.no_grad()
def test_expert() -> None:
    case = family_case("synapse_expert")
    x = inputs(case)["x"]
    for suffix in ("", "_fp16w"):
        expert = load(Expert(**case.config), case, half=bool(suffix))
        check(case, {f"y{suffix}": expert(x)} | ({} if suffix else {"hidden": expert.hidden(x)}))


@torch.no_grad()
@pytest.mark.parametrize("call", ["", "_next", "_fp16w"])
def test_pool(call: str) -> None:
    case = family_case("synapse_pool")
    given, suffix = inputs(case), "_next" if call == "_next" else ""
    dims = {key: value for key, value in case.config.items() if key != "top_k"}
    pool = load(ExpertPool(**dims), case, half=call == "_fp16w")
    x, indices, weights = (
        given[name + suffix] for name in ("x", "expert_indices", "routing_weights")
    )
    y = pool(x.flatten(0, 1), indices.flatten(0, 1), weights.flatten(0, 1))
    check(case, {f"y{call}": y.view_as(x)})


@torch.no_grad()
def test_a_repeated_index_counts_twice_and_a_strange_one_not_at_all() -> None:
    pool = ExpertPool(4, 6, 3)
    x = torch.randn(1, 4)
    y = pool(x, torch.tensor([[1, 1, 3]]), torch.tensor([[0.25, 0.5, 0.25]]))
    torch.testing.assert_close(y, 0.75 * pool.experts[1](x))


@torch.no_grad()
def test_mamba() -> None:
    case = family_case("synapse_mamba")
    given = inputs(case)
    mamba = load(Mamba(config_of(case, "mamba")), case)
    y, state = mamba(given["x"])
    check(case, {"y": y, "ssm_state": state.ssm})
    y, state = mamba(given["x_next"], MambaState(state.ssm, torch.zeros_like(state.window)))
    check(case, {"y_next": y, "ssm_state_next": state.ssm})


@torch.no_grad()
def test_mamba_token_by_token_with_and_without_its_window() -> None:
    case = family_case("synapse_mamba")
    x = inputs(case)["x"]
    mamba = load(Mamba(config_of(case, "mamba")), case)
    for name, carried in (("y", True), ("y_one_token_calls", False)):
        state, parts = mamba.new_state(len(x), x), []
        for step in range(x.shape[1]):
            y, state = mamba(x[:, step : step + 1], state)
            parts.append(y)
            if not carried:
                state = MambaState(state.ssm, torch.zeros_like(state.window))
        check(case, {name: torch.cat(parts, dim=1)})


@torch.no_grad()
def test_thalamus() -> None:
    case = family_case("synapse_thalamus")
    given = inputs(case)
    thalamus = load(Thalamus(config_of(case, "thalamus")), case)
    routes, context, state = thalamus(given["x"])
    found = {
        "context": context,
        "expert_indices": routes.experts,
        "routing_weights": routes.gates,
        "routing_probs": routes.probs,
        "ssm_state": state.ssm,
    }
    check(case, found)
    again = MambaState(state.ssm, torch.zeros_like(state.window))
    routes, _, _ = thalamus(given["x_next"], again)
    check(case, {"expert_indices_next": routes.experts, "routing_probs_next": routes.probs})


@torch.no_grad()
@pytest.mark.parametrize("name", ["synapse_xlstm", "synapse_xlstm_b2"])
def test_xlstm(name: str) -> None:
    case = family_case(name)
    given = inputs(case)
    xlstm = load(Xlstm(config_of(case, "xlstm")), case)
    y, state = xlstm(given["x"])
    check(case, {"y": y, "cell_state": state.cell, "normalizer_state": state.normalizer})
    y, state = xlstm(given["x_next"], state)
    check(case, {"y_next": y, "cell_state_next": state.cell})


@torch.no_grad()
@pytest.mark.parametrize("name", ["synapse_fast_weights", "synapse_fast_weights_b2"])
def test_fast_weights(name: str) -> None:
    """One memory for all rows, which row 0 writes: token by token, rows in lockstep."""
    case = family_case(name)
    given = inputs(case)
    module = load(FastWeights(config_of(case, "fast_weights")), case)
    rows = len(given["x"])
    memory = module.new_state(rows, given["x"])
    for call in ("", "_next"):
        x, parts = given[f"x{call}"], []
        for step in range(x.shape[1]):
            y, memory = module(x[:, step : step + 1], memory)
            memory = memory[:1].expand_as(memory)
            parts.append(y)
        check(case, {f"y{call}": torch.cat(parts, dim=1), f"fast_weights{call}": memory[0]})


def test_rmsnorm() -> None:
    case = family_case("synapse_rmsnorm")
    check(case, {"y": load(RmsNorm(16), case)(inputs(case)["x"])})


def step_by_step(
    model: SynapseModel, tokens: Tensor, states: Any, *, window: bool
) -> tuple[Tensor, Any]:
    """Logits of one-token calls, as the seed's rows run: one memory, written by row 0."""
    parts = []
    for step in range(tokens.shape[1]):
        hidden, _, states = model.steps(tokens[:, step : step + 1], states)
        states = [shared(state, window=window) for state in states]
        parts.append(model.lm_head(hidden))
    return torch.cat(parts, dim=1), states


def shared(state: LayerState, *, window: bool) -> LayerState:
    assert state.memory is not None
    mamba = state.mamba
    if not window:
        mamba = MambaState(mamba.ssm, torch.zeros_like(mamba.window))
    return LayerState(state.xlstm, mamba, state.memory[:1].expand_as(state.memory))


@torch.no_grad()
@pytest.mark.parametrize("name", ["synapse_model", "synapse_model_b2"])
@pytest.mark.parametrize("half", [False, True])
def test_model(name: str, half: bool) -> None:
    case = family_case(name)
    given = inputs(case)
    model = load(SynapseModel(config_of(case, "model")), case, half=half)
    logits, states = step_by_step(model, given["input_ids"], None, window=True)
    if half:
        check(case, {"logits_fp16_experts": logits})
        return
    check(case, {"logits": logits})
    # The seed forgets the convolution's window between calls.
    states = [shared(state, window=False) for state in states]
    logits, _ = step_by_step(model, given["input_ids_next"], states, window=True)
    check(case, {"logits_next": logits})
    logits, _ = step_by_step(model, given["input_ids"], None, window=False)
    check(case, {"logits_one_token_calls": logits})


@torch.no_grad()
def test_model_in_one_call() -> None:
    case = family_case("synapse_model")
    model = load(SynapseModel(config_of(case, "model")), case)
    tokens = inputs(case)["input_ids"]
    hidden, routes, _ = model.steps(tokens)
    logits = model.lm_head(hidden)
    found = {"logits": logits}
    for layer, taken in enumerate(routes):
        found[f"first/layer{layer}/expert_indices"] = taken.experts
        found[f"first/layer{layer}/routing_weights"] = taken.gates
    check(case, found)
    # The seed's loss shifts labels by one: each position predicts the label after its own.
    labels = inputs(case)["labels"]
    loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    np.testing.assert_allclose(float(loss), case.expected["loss_first"], rtol=1e-5)
