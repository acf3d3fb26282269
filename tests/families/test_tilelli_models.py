"""The Tilelli torch modules against the reference's numbers (tests/fixtures/families)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from evermind_exporters.checkpoints import ternary
from evermind_exporters.families import FAMILIES
from evermind_manifests.errors import ConfigError

from evermind_pack.models import AtomeLmModel, TilelliBlockModel, reference
from evermind_pack.models.tilelli import bank_penalty, ternarise
from tests.golden_families import family_case

from .tilelli import BLOCKS, LM


def block(name: str, **config: Any) -> TilelliBlockModel:
    case = family_case(name)
    return TilelliBlockModel.from_tensors({**case.config, **config}, case.weights)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_forward(name: str) -> None:
    case = family_case(name)
    model = block(name)
    for row, x in enumerate(case.inputs["x"]):
        outputs = reference(model, {"x": x})
        for key, array in outputs.items():
            if key in case.outputs:
                case.close(key, array, case.outputs[key][row])
        assert outputs.keys() >= {"forward", "h", "router_weights", "router_entropy"}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_infer(name: str) -> None:
    """At threshold 0 `infer` skips nothing, as in the fixtures, where nothing is below 0.05."""
    case = family_case(name)
    assert not case.expected.get("skipped_by_infer")
    model = block(name, semantics="infer", skip_threshold=0)
    for row, x in enumerate(case.inputs["x"]):
        case.close("infer", reference(model, {"x": x})["infer"], case.outputs["infer"][row])


@pytest.mark.parametrize("threshold", [0.05, 0.3])
@pytest.mark.parametrize("name", ["tilelli_block_p3_b1_k0", "tilelli_block_p5_b1_k0"])
def test_block_skips_by_token(name: str, threshold: float) -> None:
    case = family_case(name)
    model = block(name, semantics="infer", skip_mode="per_token", skip_threshold=threshold)
    zeros = 0
    for row, x in enumerate(case.inputs["x"]):
        outputs = reference(model, {"x": x})
        key = f"infer_per_token_{threshold}"
        case.close(key, outputs["infer"], case.outputs[key][row])
        zeros += int((outputs["pathway_weights"] == 0).sum())
    assert zeros == case.expected[f"skipped_per_token_{threshold}"]["zeroed_weights"]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_unit_and_the_auxiliary_loss(name: str) -> None:
    case = family_case(name)
    model = block(name)
    h = torch.from_numpy(case.outputs["h"])
    dims = model.block.dims
    with torch.no_grad():
        for pathway in dims.pathways:
            for bank, unit in enumerate(model.block.units(pathway)):
                key = f"unit/{pathway}.{bank}" if dims.banks > 1 else f"unit/{pathway}"
                case.close(key, unit(h).numpy(), case.outputs[key])
        _, routes, _ = model(torch.from_numpy(case.inputs["x"]))
    assert 0.01 * float(bank_penalty(routes.kept, dims)) == pytest.approx(
        case.expected["aux_loss_after_forward"], rel=1e-4, abs=1e-9
    )
    used = routes.weights > 0
    for entry in case.expected["units_used_by_forward"]:
        if isinstance(entry, dict):
            pathway, bank = entry["unit"].split(".")
            at = dims.pathways.index(pathway)
            chosen = routes.banks[..., at] == int(bank)
            assert int(chosen.sum()) == entry["tokens"]
            assert int((chosen & used[..., at]).sum()) == entry["tokens_with_weight"]


@pytest.mark.parametrize("name", BLOCKS)
def test_quantised_weights(name: str) -> None:
    case = family_case(name)
    for tensor, expected in case.expected.get("quantised", {}).items():
        if not expected["quantized"]:
            continue
        used = ternary.ternarise(case.weights[tensor])
        np.testing.assert_allclose(used.alpha, expected["scale"], rtol=1e-6)
        counts = {str(t): int((used.codes == t).sum()) for t in (-1, 0, 1)}
        assert counts == expected["trit_counts"]


def test_language_model() -> None:
    case = family_case(LM)
    model = AtomeLmModel.from_tensors(case.config, case.weights)
    for row, ids in enumerate(case.inputs["ids"]):
        outputs = reference(model, {"tokens": ids})
        for key, array in outputs.items():
            if key in case.outputs:
                case.close(key, array, case.outputs[key][row])
        assert {"logits", "block1/router", "block1/entropy", "block0/forward"} <= outputs.keys()
    assert FAMILIES["tilelli"].parameter_count(model.config) == case.expected["params"]
    logits = torch.from_numpy(case.outputs["logits"][:, :-1]).flatten(0, 1)
    targets = torch.from_numpy(case.inputs["ids"][:, 1:]).flatten()
    loss = torch.nn.functional.cross_entropy(logits, targets)
    assert float(loss) == pytest.approx(case.expected["loss_next"], abs=1e-5)


@pytest.mark.parametrize("per_row", [False, True])
def test_torch_and_numpy_quantise_alike(per_row: bool) -> None:
    weight = np.random.default_rng(3).normal(size=(40, 33)).astype(np.float32)
    weight[:2] = 0
    expected = ternary.ternarise(weight, per_row=per_row).values()
    for dtype in (torch.float32, torch.float64):
        found = ternarise(torch.from_numpy(weight).to(dtype), per_row=per_row)
        np.testing.assert_array_equal(found.numpy(), expected.astype(found.numpy().dtype))


def test_gradients_pass_straight_through() -> None:
    case = family_case("tilelli_block_p5_b4_k2")
    model = block("tilelli_block_p5_b4_k2")
    y, routes, _ = model(torch.from_numpy(case.inputs["x"]))
    (y.square().sum() + bank_penalty(routes.kept, model.block.dims)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients.values())
    assert float(gradients["router.weight"].abs().max()) > 0
    # The value used while training is that of the export, but for the last bit.
    unit = model.block.units("dense")[0]
    with torch.no_grad():
        exact = unit.up.used()
    torch.testing.assert_close(unit.up.used().detach(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hadamard": True}, "hadamard: expected false"),
        ({"lsq": True}, "lsq: expected false"),
        ({"pathways": 4}, "pathways: expected 3 or 5, found 4"),
        ({"semantics": "infer"}, "per_call"),
        ({"skip_mode": "sometimes"}, "expected one of per_call, per_token"),
        ({"quantize": False, "weights": "ternary"}, "weights: expected shadow"),
        ({"pathway_names": []}, "unknown fields: pathway_names"),
        ({"d_model": 0}, "d_model: expected an integer"),
        ({"n_banks": 2**31}, "at most 1,000,000 tensors"),
    ],
)
def test_what_cannot_be_honoured_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILIES["tilelli"].resolve({"module": "block", "d_model": 8, **config}, {})


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 60_800),
        ({"d_model": 128, "n_layers": 6}, 198_656),
        ({"d_model": 256, "n_layers": 8, "d_head": 64, "n_pathways": 3}, 944_640),
    ],
)
def test_parameters_of_known_models(config: dict[str, Any], count: int) -> None:
    family = FAMILIES["tilelli"]
    assert family.parameter_count(family.resolve({"module": "lm", **config}, {})) == count


def test_language_model_without_a_pathway() -> None:
    config = {"module": "lm", "vocab_size": 20, "d_model": 8, "d_head": 4, "n_layers": 1}
    model = AtomeLmModel({**config, "disable_pathways": ["sparse"]})
    assert model.to_tensors()["blocks.0.router.proj.weight"].shape == (2, 8)
    assert "blocks.0.sparse.Wq.weight" in model.to_tensors()
    for wrong in (["local", "state", "sparse"], ["dense"], [""], "local"):
        with pytest.raises(ConfigError, match="disable_pathways: expected some of local"):
            AtomeLmModel({**config, "disable_pathways": wrong})
    with pytest.raises(ConfigError, match="pathways: expected 3 or 5, found 4"):
        AtomeLmModel({**config, "pathways": 4, "disable_pathways": ["sparse"]})
