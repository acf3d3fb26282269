"""`tokitai-moe`: configurations, counts, packages against the torch module, sources, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evermind_runtime
import numpy as np
import pytest
import torch
from evermind_exporters import ExportOptions, ModelSource, export_package, read_source
from evermind_exporters.families import FAMILIES
from evermind_exporters.families.tokitai import SIZES, expert_count, router_count
from evermind_manifests.errors import CheckpointError, ConfigError
from evermind_manifests.package import open_package
from evermind_manifests.validate import validate
from evermind_runtime.parity import parity_problems
from safetensors.numpy import save_file

from evermind_pack.models import TokitaiMoE, reference
from evermind_pack.parity import parity_reference
from tests.golden_families import FAMILY_CASES
from tests.packages import export
from tests.tkp1 import write_tkp1

FAMILY = FAMILIES["tokitai-moe"]
COUNTS = json.loads((FAMILY_CASES / "tokitai_counts.json").read_text())
# Affordable dims: the smallest preset, and one as deep as the largest.
DIMS: dict[str, dict[str, Any]] = {
    "nano": {"size": "nano"},
    "deep": {"hidden": 160, "depth": 12, "n_experts": 5, "top_k": 3, "in_dim": 17, "out_dim": 3},
    "tanh": {"hidden": 24, "depth": 0, "gelu": "tanh", "renormalize": True, "layer_norm_eps": 0.1},
}


def random_model(config: Mapping[str, Any], seed: int = 0) -> ModelSource:
    """Every tensor matters: no bias is zero, no norm is one."""
    resolved = FAMILY.resolve(config if "module" in config else {"module": "moe", **config}, {})
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Any:
        scale = (2 / shape[1]) ** 0.5 if len(shape) == 2 else 0.2
        array = rng.normal(size=shape) * scale
        return (array + (".norms." in name and name.endswith(".weight"))).astype(np.float32)

    tensors = {name: draw(name, shape) for name, shape in FAMILY.shapes(resolved).items()}
    return ModelSource("tokitai-moe", resolved, tensors, "random")


@pytest.mark.parametrize("size", COUNTS["sizes"])
def test_presets_have_the_published_counts(size: str) -> None:
    expected = COUNTS["sizes"][size]
    outside = {key: COUNTS[key] for key in ("in_dim", "out_dim", "n_experts", "top_k")}
    config = FAMILY.resolve({"module": "moe", "size": size}, {})
    assert config.items() >= outside.items()
    assert (config["hidden"], config["depth"]) == SIZES[size.lower()]
    # The dims alone, and beside the counts, name the same size.
    assert FAMILY.resolve({"module": "moe", **outside, **expected}, {}) == config
    shapes = FAMILY.shapes(config)
    assert len(shapes) == expected["model_tensors"]
    assert sum(name.startswith("experts.0.") for name in shapes) == expected["expert_tensors"]
    assert expert_count(config) == expected["expert_params"]
    assert router_count(config) == expected["router_params"]
    assert FAMILY.parameter_count(config) == expected["total_params"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "hidden: expected a value, found None"),
        ({"size": "huge"}, "size: expected one of nano, tiny, medium, full, free, found 'huge'"),
        ({"size": "nano", "hidden": 64}, "hidden: expected 128 for size nano, found 64"),
        ({"hidden": 8, "depth": -1}, "depth: expected an integer from 0"),
        ({"hidden": 8, "depth": 1, "top_k": 5}, "top_k: expected at most n_experts = 4, found 5"),
        ({"hidden": 8, "depth": 1, "n_experts": 10**6}, "expected at most 1,000,000 tensors"),
        ({"size": "nano", "gelu": "relu"}, "gelu: expected one of erf, tanh, found 'relu'"),
        ({"size": "nano", "layer_norm_eps": 0}, "layer_norm_eps: expected a number from 1e-12"),
        ({"size": "nano", "layer_norm_variance": "unbiased"}, "layer_norm_variance: expected"),
        ({"size": "nano", "renormalize": 1}, "renormalize: expected true or false, found 1"),
        ({"size": "nano", "total_params": 195541}, "total_params: expected 195540, found 195541"),
        ({"size": "nano", "assumed": []}, "assumed: expected"),
        ({"size": "nano", "ties": None}, "ties: expected 'lower index', found None"),
        ({"size": "nano", "renormalise": True}, "unknown fields: renormalise"),
        ({"size": "nano", "seed": -1}, "seed: expected an integer from 0"),
    ],
)
def test_a_configuration_that_cannot_be(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.resolve({"module": "moe", **raw}, {})


def test_what_nobody_published_is_recorded() -> None:
    config = FAMILY.resolve({"module": "moe", "size": "tiny"}, {})
    assert config["assumed"] == ["gelu", "layer_norm_eps", "layer_norm_variance", "ties"]
    recorded = {name: config[name] for name in config["assumed"]}
    assert recorded == {
        "gelu": "erf",
        "layer_norm_eps": 1e-5,
        "layer_norm_variance": "biased",
        "ties": "lower index",
    }
    assert config["renormalize"] is False
    assert FAMILY.resolve(config, {}) == config


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("dims", DIMS)
def test_a_package_computes_what_the_torch_module_does(
    tmp_path: Path, dims: str, dtype: str
) -> None:
    source = random_model(DIMS[dims])
    package = export(source, tmp_path / "p", dtype=dtype, parity=True)
    assert validate(package, deep=True, run=parity_problems).problems == ()
    config = source.config
    with open_package(package) as opened:
        (kind,) = opened.manifest.kinds.values()
        assert len(kind.tensors) == 4 * config["depth"] + 6
        for spec in kind.tensors:
            assert spec.dtype == (dtype if len(spec.shape) == 2 else "f32")
        stored = {
            f"experts.{e}.{spec.name}": opened.read_shard(0, e).array(spec.name)
            for e in range(config["n_experts"])
            for spec in kind.tensors
        }
        assert opened.manifest.parameters.total == FAMILY.parameter_count(config)
    tensors = {name: stored.get(name, array) for name, array in source.tensors.items()}
    model = TokitaiMoE.from_tensors(config, tensors)
    x = np.random.default_rng(1).normal(size=(33, config["in_dim"])).astype(np.float32)
    expected = reference(model, {"x": x})
    scale = np.abs(expected["y"]).max()
    working_set = f"{kind.bytes * config['top_k']}B"
    results = {}
    for budget in (None, working_set):
        with evermind_runtime.load(package, budget=budget) as loaded:
            for steps in ("prefill", "decode"):
                found = loaded.forward({"x": x}, steps=steps)
                results[budget, steps] = found
                assert found.keys() == expected.keys()
                assert np.array_equal(found["ids.0"], expected["ids.0"])
                np.testing.assert_allclose(found["y"], expected["y"], atol=1e-5 * scale)
                for name in ("router_weights", "gates.0"):
                    np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
                assert np.array_equal(found["logits"], found["y"])
            assert loaded.stats().peak_resident_expert_bytes <= loaded.budget
    # Rows are independent and a paged run adds up the same numbers: not a bit differs.
    for steps in ("prefill", "decode"):
        for name, array in results[None, steps].items():
            assert np.array_equal(array, results[working_set, steps][name])
    for name, array in results[None, "prefill"].items():
        np.testing.assert_allclose(results[None, "decode"][name], array, atol=1e-4 * scale)


def test_the_kept_mass_is_not_renormalised(tmp_path: Path) -> None:
    source = random_model({"size": "nano"})
    with evermind_runtime.load(export(source, tmp_path / "p")) as model:
        x = np.random.default_rng(2).normal(size=(20, 96)).astype(np.float32)
        found = model.forward({"features": x})
    weights = found["router_weights"]
    assert weights.shape == (20, 4)
    assert ((weights > 0).sum(-1) == 2).all()
    logits = x @ source.tensors["router.weight"].T + source.tensors["router.bias"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = np.where(p >= np.sort(p, -1)[:, -2:-1], p, 0)
    np.testing.assert_allclose(weights, kept, atol=1e-6)
    assert (weights.sum(-1) < 0.999).any()


def test_introspection_tells_kept_mass_top_weight_and_entropy(tmp_path: Path) -> None:
    source = random_model({"size": "nano"})
    x = np.random.default_rng(5).normal(size=(12, 96)).astype(np.float32)
    x[0] *= 1000  # certain: all other probabilities are 0
    with evermind_runtime.load(export(source, tmp_path / "p")) as model:
        model.observe()
        weights = model.forward({"x": x})["router_weights"]
        seen = model.introspect().observations
        # A gate of 0 is no use of an expert.
        assert sum(expert.tokens for expert in model.introspect().layers[0].experts) == 23
    p = seen["probabilities.0"].astype(np.float64)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    assert entropy[0] < 1e-6 < entropy[1:].min()
    np.testing.assert_allclose(seen["entropy.0"], entropy, atol=1e-5)
    np.testing.assert_allclose(seen["kept_mass.0"], weights.sum(-1), atol=1e-6)
    np.testing.assert_allclose(seen["top_weight.0"], weights.max(-1), atol=1e-6)


def test_ties_go_to_the_lower_index(tmp_path: Path) -> None:
    source = random_model({"hidden": 8, "depth": 0})
    tensors = {**source.tensors}
    for name in ("router.weight", "router.bias"):
        tensors[name] = np.zeros_like(tensors[name])
    flat = ModelSource(source.family, source.config, tensors, "flat")
    x = np.ones((2, 96), np.float32)
    model = TokitaiMoE.from_tensors(source.config, tensors)
    assert reference(model, {"x": x})["ids.0"].tolist() == [[0, 1], [0, 1]]
    with evermind_runtime.load(export(flat, tmp_path / "p")) as loaded:
        assert loaded.forward({"x": x})["ids.0"].tolist() == [[0, 1], [0, 1]]


def test_experts_that_are_not_routed_to_are_never_read(tmp_path: Path) -> None:
    source = random_model({"size": "nano"})
    package = export(source, tmp_path / "p")
    x = np.random.default_rng(3).normal(size=(1, 96)).astype(np.float32)
    with evermind_runtime.load(package) as model:
        used = set(model.forward({"x": x})["ids.0"].ravel().tolist())
    assert len(used) == 2
    for expert in set(range(4)) - used:
        (package / f"experts/l000/e{expert:04d}.moe0").write_bytes(b"")
    for steps in ("prefill", "decode"):
        with open_package(package) as opened:
            size = next(iter(opened.manifest.kinds.values())).bytes
        with evermind_runtime.load(package, budget=2 * size) as model:
            model.forward({"x": x}, steps=steps)
            assert model.stats().bytes_read == 2 * size


def test_a_gate_of_zero_reads_no_expert(tmp_path: Path) -> None:
    package = export(random_model({"size": "nano"}), tmp_path / "p")
    x = 1000 * np.random.default_rng(5).normal(size=(1, 96)).astype(np.float32)
    found = []
    for steps in ("prefill", "decode"):
        with evermind_runtime.load(package, plan="paged") as model:
            values = model.forward({"x": x}, steps=steps)
            assert values["gates.0"].tolist() == [[1, 0]]
            tokens = [expert.tokens for expert in model.introspect().layers[0].experts]
            found.append((values["logits"], tokens, model.stats().bytes_read))
            assert sum(tokens) == 1
    assert found[0][1:] == found[1][1:]
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)


def test_streamed_and_held_models_agree() -> None:
    source = random_model(DIMS["deep"])
    inputs = FAMILY.sample_inputs(source.config, 1)
    model = TokitaiMoE.from_tensors(source.config, source.tensors)
    held = reference(model, inputs)
    streamed = parity_reference("tokitai-moe")(source.config, source.tensors)(inputs)
    assert 0 < streamed.pop("margin") < 1
    assert streamed.keys() == held.keys()
    for name, array in held.items():
        assert np.array_equal(array, streamed[name])


def test_the_dense_form_is_the_same_function() -> None:
    """All experts on the whole batch, masked by the weights: what is published upstream."""
    source = random_model({"size": "nano"})
    model = TokitaiMoE.from_tensors(source.config, source.tensors).double()
    x = torch.from_numpy(np.random.default_rng(4).normal(size=(9, 96)))
    with torch.no_grad():
        out = model(x)
        dense = sum(
            out.router_weights[:, e, None] * expert(x) for e, expert in enumerate(model.experts)
        )
    torch.testing.assert_close(out.logits, dense, rtol=1e-12, atol=1e-12)


def test_a_seed_gives_the_same_weights_and_halves_act_apart() -> None:
    def fresh(seed: int) -> Any:
        return FAMILY.initial(FAMILY.resolve({"module": "moe", "size": "nano", "seed": seed}, {}))

    one, again, router, experts = fresh(7), fresh(7), fresh(8), fresh(7 + 2**32)
    for name in one:
        assert np.array_equal(one[name], again[name])
    matrix = "experts.2.linears.1.weight"
    assert np.array_equal(one[matrix], router[matrix])
    assert not np.array_equal(one["router.weight"], router["router.weight"])
    assert not np.array_equal(one[matrix], experts[matrix])
    assert np.array_equal(one["router.weight"], experts["router.weight"])
    assert not np.array_equal(one[matrix], one["experts.1.linears.1.weight"])
    assert one[matrix].std() == pytest.approx((2 / 128) ** 0.5, rel=0.02)
    assert (one["experts.0.norms.0.weight"] == 1).all()
    assert not one["experts.0.norms.0.bias"].any()
    assert not one["router.bias"].any()


def test_a_preset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_source(Path("tokitai-moe:nano"), seed=7)
    assert source.config["seed"] == 7
    assert source.card.training_summary == "none: the weights are random, seed 7"
    reference = parity_reference(source.family)
    digest = export_package(source, tmp_path / "p", ExportOptions(), reference=reference)
    assert validate(tmp_path / "p", deep=True, run=parity_problems).problems == ()
    again = read_source(Path("tokitai-moe:nano"), seed=7)
    assert export_package(again, tmp_path / "q", ExportOptions(), reference=reference) == digest
    with pytest.raises(ConfigError, match="a preset of tokitai-moe: nano, tiny, medium, full; fo"):
        read_source(Path("tokitai-moe:huge"))
    with pytest.raises(ConfigError, match="a preset of limbic: it has none"):
        read_source(Path("limbic:nano"))
    # A file of that name goes first, and its weights are not drawn.
    monkeypatch.chdir(tmp_path)
    _state_dict(Path("tokitai-moe:nano"), random_model({"size": "nano"}))
    with pytest.raises(ConfigError, match="seed: expected none"):
        read_source(Path("tokitai-moe:nano"), seed=7)
    assert "seed" not in read_source(Path("tokitai-moe:nano")).config


def _state_dict(folder: Path, source: ModelSource, **config: Any) -> Path:
    folder.mkdir()
    save_file(dict(source.tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"family": "tokitai-moe", "module": "moe", "size": "Nano"},
        {"family": "tokitai-moe", "hidden": 128, "depth": 2},
        {"family": "tokitai-moe"},
        {},
    ],
)
def test_a_state_dict_tells_what_the_configuration_does_not(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    source = random_model({"size": "nano"})
    found = read_source(_state_dict(tmp_path / "m", source, **config))
    assert (found.family, found.config) == ("tokitai-moe", source.config)
    for name, array in source.tensors.items():
        assert np.array_equal(found.tensors[name], array)


def test_dims_and_tensors_that_do_not_agree(tmp_path: Path) -> None:
    source = random_model({"size": "nano"})
    wrong = _state_dict(tmp_path / "a", source, family="tokitai-moe", hidden=64, depth=2)
    with pytest.raises(CheckpointError, match=r"shape: expected \(64, 96\), found \(128, 96\)"):
        read_source(wrong)
    odd = ModelSource("", {}, {"router.bias": np.zeros(4, np.float32)}, "odd")
    with pytest.raises(ConfigError, match=r"module: expected one of moe, found none.*router\.bias"):
        read_source(_state_dict(tmp_path / "b", odd, family="tokitai-moe"))


ARCH = {
    "size_variant": "Custom-free",
    "dims": {"input_dim": 17, "output_dim": 3, "hidden_dim": 160, "depth": 12, "top_k": 3},
    "expert_count": 5,
    "seed": 42,
    "model_family": "MoE",
    "router_kind": "softmax",
    "fingerprint": "ab" * 32,
}


def _run_folder(folder: Path, source: ModelSource, arch: Mapping[str, Any], **options: Any) -> Path:
    folder.mkdir()
    (folder / "arch.json").write_text(json.dumps(arch))
    (folder / "checkpoint.tkp1").write_bytes(write_tkp1(source.tensors, **options))
    return folder


@pytest.mark.parametrize("arch", [{"variant": "nano", "family": "moe"}, {}])
def test_a_tkp1_checkpoint_gives_the_package_of_its_state_dict(
    tmp_path: Path, arch: dict[str, Any]
) -> None:
    source = random_model({"size": "nano"})
    folder = _run_folder(tmp_path / "random", source, arch, gradients=True, step=250)
    expected = export_package(source, tmp_path / "expected")
    for number, path in enumerate((folder, folder / "checkpoint.tkp1")):
        found = read_source(path)
        assert found.card.training_summary == "250 steps"
        plain = ModelSource(found.family, found.config, found.tensors, "random")
        assert export_package(plain, tmp_path / f"p{number}") == expected


def test_an_architecture_is_recorded_and_must_fit(tmp_path: Path) -> None:
    source = random_model(DIMS["deep"])
    arch = {**ARCH, "size_variant": "free"}
    found = read_source(_run_folder(tmp_path / "a", source, arch))
    assert found.config["fingerprint"] == "ab" * 32
    assert found.config["router_kind"] == "softmax"
    assert found.config["seed"] == 42
    assert found.config["top_k"] == 3
    for number, (change, error, message) in enumerate(
        [
            ({"size_variant": "Custom"}, ConfigError, "size: expected one of"),
            ({"expert_count": 4}, CheckpointError, r"does not match arch\.json"),
            ({"hidden_dim": 99}, CheckpointError, r"shape: expected \(99, 17\), found \(160, 17\)"),
            ({"model_family": "dense"}, CheckpointError, "expected a mixture of experts, found"),
        ]
    ):
        with pytest.raises(error, match=message):
            read_source(_run_folder(tmp_path / f"b{number}", source, arch | change))
    (tmp_path / "a" / "arch.json").unlink()
    with pytest.raises(CheckpointError, match=r"arch\.json"):
        read_source(tmp_path / "a")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ({"num_experts_per_tok": 1}, {"top_k": 1}),
        ({"model": {"router": {"top_k": 1, "kind": "softmax"}}, "layers": [1]}, {"top_k": 1}),
        ({"experts_per_token": 3, "model": {"top_k": 1}, "seed": None}, {"top_k": 3}),
        ({"beam": {"k": 3}, "optimizer": {"kind": "adamw"}}, {"top_k": 2}),
        (
            {"gelu": "tanh", "layer_norm_eps": 1e-3, "renormalize": True},
            {"gelu": "tanh", "layer_norm_eps": 1e-3, "renormalize": True},
        ),
    ],
)
def test_what_an_architecture_says(
    tmp_path: Path, arch: dict[str, Any], expected: dict[str, Any]
) -> None:
    folder = _run_folder(tmp_path / "a", random_model({"size": "nano"}), arch)
    config = read_source(folder).config
    assert {key: config[key] for key in expected} == expected
    assert "seed" not in config


@pytest.mark.parametrize("value", [1.0, [1], "1", {"value": 1}])
def test_an_unusable_value_is_refused_and_config_json_overrules_it(
    tmp_path: Path, value: Any
) -> None:
    folder = _run_folder(tmp_path / "a", random_model({"size": "nano"}), {"top_k": value})
    with pytest.raises(ConfigError, match="top_k: expected an integer"):
        read_source(folder)
    (folder / "config.json").write_text(json.dumps({"family": "tokitai-moe", "top_k": 1}))
    assert read_source(folder).config["top_k"] == 1
    (folder / "config.json").write_text(json.dumps({"family": "tilelli"}))
    with pytest.raises(CheckpointError, match="family: expected 'tokitai-moe'"):
        read_source(folder)


def test_a_checkpoints_matrix_that_is_no_matrix(tmp_path: Path) -> None:
    source = random_model({"size": "nano"})
    tensors = {**source.tensors, "router.weight": np.zeros(4 * 96 + 1, np.float32)}
    odd = ModelSource(source.family, source.config, tensors, "odd")
    with pytest.raises(CheckpointError, match=r"router\.weight: expected a multiple of its bias"):
        read_source(_run_folder(tmp_path / "a", odd, {"size": "nano"}))


PEAK = """
import sys
from pathlib import Path
from evermind_pack.cli import main
code = main(sys.argv[1:])
status = Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) * 1024)
sys.exit(code)
"""


def _peak(*arguments: str) -> int:
    command = [sys.executable, "-c", PEAK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_large_experts_are_exported_and_run_in_little_memory(tmp_path: Path) -> None:
    """The bounds of `full`, at a tenth of its size: experts of 43 MB."""
    package = tmp_path / "tiny"
    peak = _peak("export", "tokitai-moe:tiny", "-o", str(package), "-q", "--json")
    with open_package(package) as opened:
        expert = max(shard.bytes for shard in opened.manifest.shards)
        assert opened.manifest.parameters.total == 84_984_276
    assert expert > 42_000_000
    assert peak < 1.5 * expert + 300e6
    assert validate(package, deep=True, run=parity_problems).problems == ()

    x = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    results = []
    for budget in (2 * expert, 4 * expert):
        output = str(tmp_path / "y.npz")
        inputs = ["--inputs", str(tmp_path / "x.npz"), "--outputs", output]
        peak = _peak("run", str(package), *inputs, "--budget", f"{budget}B", "-q", "--json")
        assert peak < budget + 100 * 2**20
        with np.load(output) as found:
            results.append(dict(found))
    for name, array in results[0].items():
        assert np.array_equal(array, results[1][name])
