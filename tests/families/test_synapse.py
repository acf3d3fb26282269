"""Packages of the Synapse modules compute what the published modules do (specs/synapse.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters import read_source
from evermind_manifests.errors import CheckpointError, ConfigError, NonFiniteError
from evermind_manifests.package import open_package
from evermind_manifests.validate import validate
from evermind_runtime.parity import parity_problems
from safetensors.numpy import load_file, save_file

from evermind_pack.cli import main
from tests.golden_families import family_case
from tests.packages import export

from .synapse import forget_window, lockstep, package, write_source

MODULES = ("expert", "pool", "mamba", "thalamus", "xlstm", "fast_weights", "model")
PROGRAMS = ("prefill", "decode")
# Case → inputs, outputs of the first call, outputs of a second one that goes on from it.
RECURRENT: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "pool": (("x", "expert_indices", "routing_weights"), ("y",), ("y",)),
    "mamba": (("x",), ("y", "ssm_state"), ("y", "ssm_state")),
    "thalamus": (
        ("x",),
        ("context", "expert_indices", "routing_probs", "routing_weights", "ssm_state"),
        ("expert_indices", "routing_probs", "routing_weights"),
    ),
    "xlstm": (("x",),) + 2 * (("y", "cell_state", "normalizer_state"),),
    "xlstm_b2": (("x",),) + 2 * (("y", "cell_state", "normalizer_state"),),
    "fast_weights": (("x",),) + 2 * (("y", "fast_weights"),),
    "model": (("input_ids",), ("logits",), ("logits",)),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_packages_are_valid_and_compute_what_torch_does(module: str, dtype: str) -> None:
    where = package(module, dtype)
    assert validate(where, deep=True).problems == ()
    with open_package(where) as opened:
        assert opened.manifest.config["module"] == module
        assert parity_problems(opened) == []


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("steps", PROGRAMS)
def test_modules_give_the_golden_outputs(name: str, steps: Any) -> None:
    case = family_case(f"synapse_{name}")
    inputs, first, second = RECURRENT[name]
    with em.load(package(name)) as model:
        rows = len(case.inputs[inputs[0]])
        states = [model.new_state() for _ in range(rows)]
        given = {key: case.inputs[key] for key in inputs}
        case.check(shown(model.forward(given, state=states, steps=steps), first))
        given = {key: case.inputs[f"{key}_next"][:rows] for key in inputs}
        forget_window(states)
        states = states[: len(case.inputs[f"{inputs[0]}_next"])]
        found = model.forward(given, state=states, steps=steps)
        case.check({f"{key}_next": array for key, array in shown(found, second).items()})


def shown(outputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The memory has no axis of rows in the golden files."""
    return {key: outputs[key][0] if key == "fast_weights" else outputs[key] for key in names}


@pytest.mark.parametrize("name", ["mamba", "xlstm", "xlstm_b2", "model"])
def test_calls_of_one_token_without_the_window_are_the_seeds(name: str) -> None:
    case = family_case(f"synapse_{name}")
    key, output = ("input_ids", "logits") if name == "model" else ("x", "y")
    with em.load(package(name)) as model:
        states = [model.new_state() for _ in range(len(case.inputs[key]))]
        given = {key: case.inputs[key]}
        found = lockstep(model, given, states, output, window=False)
        case.check({f"{output}_one_token_calls": found})


@pytest.mark.parametrize("name", ["fast_weights_b2", "model_b2"])
def test_rows_that_share_a_memory_are_the_seeds(name: str) -> None:
    """Rows of a package are independent; in the seed row 0 writes the memory that all read."""
    case = family_case(f"synapse_{name}")
    key, output = ("input_ids", "logits") if name == "model_b2" else ("x", "y")
    with em.load(package(name)) as model:
        states = [model.new_state() for _ in range(2)]
        given, after = {key: case.inputs[key]}, {key: case.inputs[f"{key}_next"]}
        alone = model.forward(given)[output]
        case.check({output: lockstep(model, given, states, output)})
        forget_window(states)
        case.check({f"{output}_next": lockstep(model, after, states, output)})
        # Row 0 does not notice the others.
        case.close(output, alone[0], case.outputs[output][0])
        if name == "model_b2":
            states = [model.new_state() for _ in range(2)]
            found = lockstep(model, given, states, output, window=False)
            case.check({"logits_one_token_calls": found})


@pytest.mark.parametrize("steps", PROGRAMS)
def test_half_experts_give_the_golden_half_outputs(steps: Any) -> None:
    case = family_case("synapse_expert")
    with em.load(package("expert", "f16")) as model:
        case.check({"y_fp16w": model.forward({"x": case.inputs["x"]}, steps=steps)["y"]})
    case = family_case("synapse_pool")
    names = ("x", "expert_indices", "routing_weights")
    with em.load(package("pool", "f16")) as model:
        found = model.forward({name: case.inputs[name] for name in names}, steps=steps)
        case.check({"y_fp16w": found["y"]})
    case = family_case("synapse_model")
    with em.load(package("model", "f16")) as model:
        found = model.forward({"input_ids": case.inputs["input_ids"]}, steps=steps)
        case.check({"logits_fp16_experts": found["logits"]})
    case = family_case("synapse_model_b2")
    with em.load(package("model_b2", "f16")) as model:
        states = [model.new_state() for _ in range(2)]
        given = {"input_ids": case.inputs["input_ids"]}
        case.check({"logits_fp16_experts": lockstep(model, given, states, "logits")})


@pytest.mark.parametrize("steps", PROGRAMS)
def test_expert_and_routes_of_the_model(steps: Any) -> None:
    case = family_case("synapse_expert")
    with em.load(package("expert")) as model:
        case.check({"y": model.forward({"x": case.inputs["x"]}, steps=steps)["y"]})
    case = family_case("synapse_model")
    with em.load(package("model")) as model:
        found = model.forward({"tokens": case.inputs["input_ids"]}, steps=steps)
        for layer in range(2):
            golden = f"first/layer{layer}/"
            case.check(
                {
                    f"{golden}expert_indices": found[f"ids.{layer}"],
                    f"{golden}routing_weights": found[f"gates.{layer}"],
                }
            )


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("steps", PROGRAMS)
def test_paged_and_unpaged_runs_are_the_same_bits(dtype: str, steps: Any) -> None:
    tokens = {"tokens": np.arange(30) % 40}
    with em.load(package("model", dtype)) as whole:
        expected = whole.forward(tokens, steps=steps)
    with pytest.warns(em.PagingWarning):
        paged = em.load(package("model", dtype), budget="25%")
    with paged:
        found = paged.forward(tokens, steps=steps)
        assert paged.stats().evictions > 0
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_many_tokens_at_once_and_one_by_one_agree() -> None:
    tokens = {"tokens": np.random.default_rng(5).integers(0, 40, 48)}
    with em.load(package("model")) as model:
        once, states = {}, {steps: model.new_state() for steps in PROGRAMS}
        for steps, state in states.items():
            once[steps] = model.forward(tokens, state=state, steps=steps)["logits"]  # type: ignore[arg-type]
        np.testing.assert_allclose(once["prefill"], once["decode"], rtol=1e-4, atol=1e-4)
        after = [state.save() for state in states.values()]
        for name, array in after[0].items():
            np.testing.assert_allclose(array, after[1][name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_pools_strange_and_repeated_routes() -> None:
    case = family_case("synapse_pool")
    x = case.inputs["x"][0, :3]
    with em.load(package("pool")) as model:

        def run(indices: list[list[int]], weights: list[list[float]]) -> Any:
            given = {"x": x, "expert_indices": indices, "routing_weights": np.float32(weights)}
            found = [model.forward(given, steps=steps)["y"] for steps in PROGRAMS]  # type: ignore[arg-type]
            np.testing.assert_allclose(*found, atol=1e-6)
            return found[0]

        odd = run([[1, 1], [2, 5], [-1, 99]], [[0.25, 0.5], [0.75, 0.25], [1.0, 1.0]])
        plain = run([[1, 0], [2, 0], [0, 1]], [[0.75, 0.0], [0.75, 0.0], [0.0, 0.0]])
        np.testing.assert_allclose(odd, plain, atol=1e-6)
        assert not odd[2].any()
        counted = model.introspect().layers[0]
        assert [one.tokens for one in counted.experts[3:]] == [0, 0]


def test_a_memory_that_grows_is_refused_and_named(tmp_path: Path) -> None:
    case = family_case("synapse_model")
    weights = dict(case.weights)
    weights["layers.1.xlstm.w_f.bias"] = weights["layers.1.xlstm.w_f.bias"] + 12
    folder = write_source(case, tmp_path / "source")
    save_file(weights, folder / "model.safetensors")
    where = export(read_source(folder), tmp_path / "package")
    # The first layer that is to blame, not those that pass it on.
    message = r"(?s)'\w+\.1'.* NaN.*layer 1, the xLSTM.*without a stabiliser"
    tokens = np.arange(40) % 40
    for steps in PROGRAMS:
        with em.load(where) as model:
            state = model.new_state()
            model.forward({"tokens": tokens[:2]}, state=state, steps=steps)  # type: ignore[arg-type]
            before = state.save()
            with pytest.raises(NonFiniteError, match=message):
                model.forward({"tokens": tokens}, state=state, steps=steps, outputs=[])  # type: ignore[arg-type]
            for name, array in state.save().items():
                np.testing.assert_array_equal(array, before[name], err_msg=name)
            # The state still works.
            model.forward({"tokens": tokens[:1]}, state=state, steps=steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mamba", "thalamus", "xlstm", "fast_weights"])
def test_numbers_that_are_not_finite_do_not_stay_in_a_module(name: str) -> None:
    x = family_case(f"synapse_{name}").inputs["x"][0, :3]
    for steps in PROGRAMS:
        with em.load(package(name)) as model:
            state = model.new_state()
            before = state.save()
            for factor, cause in ((np.nan, "input 'x' is not finite"), (1e30, "usually the")):
                with pytest.raises(
                    NonFiniteError, match=rf"state '\w+'.* infinite or NaN; {cause}"
                ):
                    model.forward({"x": x * np.float32(factor)}, state=state, steps=steps)  # type: ignore[arg-type]
            for key, array in state.save().items():
                np.testing.assert_array_equal(array, before[key])


def test_the_command_line_takes_and_gives_the_golden_names(tmp_path: Path) -> None:
    case = family_case("synapse_mamba")
    source = write_source(case, tmp_path / "source", module="mamba")
    where, first, second = (str(tmp_path / name) for name in ("pkg", "in.npz", "next.npz"))
    out, state = str(tmp_path / "out.npz"), str(tmp_path / "state.npz")
    assert main(["export", str(source), "-o", where, "-q"]) == 0
    assert main(["validate", where, "--deep", "--run", "-q"]) == 0
    np.savez(first, x=case.inputs["x"])
    np.savez(second, x=case.inputs["x_next"])
    run = ["run", where, "-q", "--outputs", out]
    assert main([*run, "--inputs", first, "--state-out", state]) == 0
    with np.load(out) as found:
        case.check(dict(found))
    with np.load(state) as saved:
        carried = dict(saved)
    # The published module carries this alone: its window starts from nothing at every call.
    published = {"ssm_state": carried["ssm_state"]}
    case.check(published)
    np.savez(state, **published)
    assert main([*run, "--inputs", second, "--state-in", state]) == 0
    with np.load(out) as found:
        case.check({f"{name}_next": array for name, array in found.items()})


@pytest.mark.parametrize("steps", PROGRAMS)
def test_a_call_without_tokens_gives_the_state_as_it_is(steps: Any) -> None:
    case = family_case("synapse_xlstm")
    x = case.inputs["x"][0]
    with em.load(package("xlstm")) as model:
        state = model.new_state()
        model.forward({"x": x}, state=state)
        held = state.save()
        found = model.forward({"x": x[:0]}, state=state, steps=steps)
    assert found.pop("y").shape == (0, x.shape[1])
    assert found.keys() == held.keys()
    for name, array in found.items():
        assert array.any()
        np.testing.assert_array_equal(array, held[name])


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"family": ["synapse"]}, CheckpointError, r"family: expected one of .*\['synapse'\]"),
        ({"decay": 10**400}, ConfigError, "decay: expected a number"),
        ({"vocabulary": [1]}, CheckpointError, r"vocabulary: expected 'bytes', found \[1\]"),
    ],
)
def test_a_configuration_of_the_wrong_types(
    tmp_path: Path, config: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_source(write_source(family_case("synapse_fast_weights"), tmp_path, **config))


def test_a_module_is_told_by_its_tensors_or_the_error_says_what_was_found(tmp_path: Path) -> None:
    case = family_case("synapse_xlstm")
    folder = write_source(case, tmp_path)
    assert read_source(folder).config["module"] == "xlstm"
    config = json.loads((folder / "config.json").read_text())
    del config["family"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_source(folder).family == "synapse"
    write_source(case, tmp_path, module="cortex")
    with pytest.raises(ConfigError, match=r"module: expected one of .*found 'cortex'"):
        read_source(folder)
    write_source(case, tmp_path)
    save_file({"a": np.zeros(2), "b": np.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"module: expected one of model.*\ba, b\b"):
        read_source(folder)


def test_memories_in_a_state_dict_are_left_out(tmp_path: Path) -> None:
    case = family_case("synapse_model")
    folder = write_source(case, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.memory.fast_weights"] = np.ones((2, 8, 8), np.float32)
    save_file(weights, folder / "model.safetensors")
    assert "layers.0.memory.fast_weights" not in read_source(folder).tensors
    del weights["layers.0.memory.w_gate.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.memory\.w_gate\.weight: missing"):
        read_source(folder)


def test_counts_are_in_manifest_and_card() -> None:
    where = package("model")
    with open_package(where) as opened:
        parameters = opened.manifest.parameters
        assert (parameters.total, parameters.active) == (24_632, 20_024)
    card = (where / "README.md").read_text()
    assert "24,632" in card
    assert "20,024" in card
