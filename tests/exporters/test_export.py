"""Packages from models: deterministic, lossless where they say so, loud where they cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import evermind_runtime as em
import ml_dtypes  # noqa: F401  (bfloat16 for numpy)
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from evermind_exporters import ExportOptions, ModelSource, export_package, read_source
from evermind_exporters.checkpoints import read_checkpoint
from evermind_exporters.families import FAMILIES
from evermind_exporters.parity import parity_file
from evermind_exporters.safetensors_file import SafetensorsFile
from evermind_manifests import dtypes
from evermind_manifests.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    LocationError,
)
from evermind_manifests.package import open_package
from evermind_manifests.validate import validate
from evermind_runtime import onnx_runtime
from safetensors.numpy import save_file

from evermind_pack.models import MODELS
from evermind_pack.parity import parity_reference
from tests.packages import GOLDEN, LM_CONFIG, export, golden_source, lm_source, random_source

FAMILY_CASES = ["moe_six", "lm_small", "limbic_small"]


@pytest.mark.parametrize("case", FAMILY_CASES)
@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, case: str, suffix: str) -> None:
    reference = parity_reference(golden_source(case).family)
    digests = {
        export_package(golden_source(case), tmp_path / f"{n}{suffix}", reference=reference)
        for n in range(2)
    }
    assert len(digests) == 1
    if suffix:
        assert (tmp_path / "0.zip").read_bytes() == (tmp_path / "1.zip").read_bytes()


@pytest.mark.parametrize("case", FAMILY_CASES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_package_passes_every_level_of_validation(tmp_path: Path, case: str, dtype: str) -> None:
    package = export(golden_source(case), tmp_path / "p", dtype=dtype, parity=True)
    report = validate(package, deep=True)
    assert report.problems == ()
    for path in package.glob("graphs/*.onnx"):
        # The external twin's data is a shard, which the checker cannot find by name.
        if not path.name.endswith("_external.onnx"):
            onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("case", ["moe_six", "moe_small", "lm_small", "lm_trained"])
def test_truncation_gives_the_peers_half_model(tmp_path: Path, case: str) -> None:
    """From float32 weights, the same numbers as from the peer's own half file, bit for bit."""
    cut = export(golden_source(case), tmp_path / "cut", rounding="truncate")
    half = export(golden_source(case, half=True), tmp_path / "half")
    with open_package(cut) as one, open_package(half) as other:
        assert [s.sha256 for s in one.manifest.shards] == [s.sha256 for s in other.manifest.shards]
        resident = one.manifest.resident
        assert resident is not None
        assert one.manifest.files[resident] == other.manifest.files[resident]


def test_shards_hold_the_experts_and_nothing_else_changes(tmp_path: Path) -> None:
    source = lm_source()
    package = export(source, tmp_path / "p", dtype="bf16")
    with open_package(package) as opened:
        found = opened.read_shard(2, 5)
        kind = opened.manifest.kinds["relu-ffn"]
        for spec in kind.tensors:
            original = source.tensors[f"layers.2.moe.experts.5.{spec.name}"]
            stored = dtypes.encode(original, "bf16", "nearest")
            assert bytes(found.views[spec.name]) == stored.tobytes()


def test_the_external_twin_of_an_expert_computes_the_same(tmp_path: Path) -> None:
    """What the browser runs: the shard's own bytes as `expert.bin`."""
    package = export(lm_source(), tmp_path / "p")
    with open_package(package) as opened:
        kind = opened.manifest.kinds["relu-ffn"]
        assert kind.graph_external is not None
        shard = opened.shard(1, 3)
        data = np.zeros(shard.bytes, dtype=np.uint8)
        opened.store.read_into(shard.file, shard.offset, data.data)
        onnx_runtime.start()
        options = onnx_runtime.session_options()
        options.add_external_initializers_from_files_in_memory(
            ["expert.bin"], [data], [data.nbytes]
        )
        providers = ["CPUExecutionProvider"]
        twin = ort.InferenceSession(opened.read_file(kind.graph_external), options, providers)
        plain = ort.InferenceSession(
            opened.read_file(kind.graph), onnx_runtime.session_options(), providers
        )
        contents = opened.read_shard(1, 3)
        x = np.random.default_rng(0).normal(size=(5, LM_CONFIG["dModel"])).astype(np.float32)
        weights = {spec.name: contents.array(spec.name).astype(np.float16) for spec in kind.tensors}
        (expected,) = plain.run(None, {"x": x, **weights})
        (found,) = twin.run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_weight_too_large_for_half_precision_is_named(tmp_path: Path) -> None:
    source = random_source("evermind-lm", LM_CONFIG)
    source.tensors["layers.1.moe.experts.2.w1"][3, 4] = 1e6  # type: ignore[index]
    with pytest.raises(ExportError, match=r"layers\.1\.moe\.experts\.2\.w1.*1e\+06(.|\n)*bf16"):
        export(source, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
    assert export(source, tmp_path / "p", dtype="bf16").is_dir()


def test_truncating_anything_but_half_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs dtype f16, not bf16"):
        export(lm_source(), tmp_path / "p", dtype="bf16", rounding="truncate")


def test_an_existing_package_is_kept_unless_told(tmp_path: Path) -> None:
    package = export(lm_source(), tmp_path / "p")
    before = (package / "manifest.json").read_bytes()
    with pytest.raises(ExportError, match="exists"):
        export(lm_source(), package, dtype="f32")
    assert (package / "manifest.json").read_bytes() == before
    export(lm_source(), package, dtype="f32", overwrite=True)
    assert (package / "manifest.json").read_bytes() != before


def _write_run(folder: Path, source: ModelSource, rename: Any = None) -> Path:
    folder.mkdir()
    config = {**source.config, "family": source.family, "vocabulary": "bytes"}
    (folder / "config.json").write_text(json.dumps(config))
    rename = rename or (lambda name: name)
    tensors = {rename(name): array for name, array in source.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_state_dict_is_read_by_folder_or_file(tmp_path: Path) -> None:
    source = random_source("evermind-lm", LM_CONFIG | {"vocabSize": 256})
    folder = _write_run(tmp_path / "run", source)
    expected = export_package(source, tmp_path / "direct")
    for number, path in enumerate((folder, folder / "model.safetensors")):
        found = read_source(path)
        assert found.family == "evermind-lm"
        assert found.tokenizer == "bytes"
        plain = ModelSource(found.family, found.config, found.tensors, "random")
        assert export_package(plain, tmp_path / f"p{number}") == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_state_dict_of_another_precision_is_read_as_float32(tmp_path: Path, dtype: str) -> None:
    source = golden_source("moe_six")
    stored = {name: array.astype(dtype) for name, array in source.tensors.items()}
    found = read_source(_write_run(tmp_path / "run", replace(source, tensors=stored)))
    for name, array in stored.items():
        assert found.tensors[name].dtype == np.float32
        assert np.array_equal(found.tensors[name], array.astype(np.float32))


def test_the_peers_names_for_a_lone_layer_are_understood(tmp_path: Path) -> None:
    source = golden_source("moe_six")

    def peer_name(name: str) -> str:
        return name.replace("router.weight", "wr").replace("experts.", "expert")

    found = read_source(_write_run(tmp_path / "run", source, peer_name))
    for name, array in source.tensors.items():
        assert np.array_equal(found.tensors[name], array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"experts\.0\.w1: missing"),
        ("extra", r"surprise: not part of the model"),
        ("shape", r"shared\.b1: shape: expected \(10,\), found \(5, 2\)"),
        ("dtype", r"shared\.b2: dtype: expected a float, found I64"),
        ("family", r"family: expected one of .*found 'tilelli2'"),
        ("dims", r"topK: expected at most numExperts"),
        ("garbage", "not a safetensors file"),
        ("json", "not JSON"),
    ],
)
def test_a_damaged_state_dict_is_refused(tmp_path: Path, damage: str, message: str) -> None:
    source = golden_source("moe_six")
    tensors: dict[str, Any] = dict(source.tensors)
    config = {**source.config, "family": source.family}
    if damage == "missing":
        del tensors["experts.0.w1"]
    elif damage == "extra":
        tensors["surprise"] = np.zeros(3, dtype=np.float32)
    elif damage == "shape":
        tensors["shared.b1"] = tensors["shared.b1"].reshape(5, 2)
    elif damage == "dtype":
        tensors["shared.b2"] = tensors["shared.b2"].astype(np.int64)
    elif damage == "family":
        config["family"] = "tilelli2"
    elif damage == "dims":
        config["topK"] = 7
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{" if damage == "json" else json.dumps(config))
    if damage == "garbage":
        (folder / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"{ not json at all")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_source(folder)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocationError, match="nothing-here: there is no such folder or file"):
        read_source(tmp_path / "nothing-here")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*found none") as caught:
        read_source(tmp_path)
    assert caught.value.hint
    assert caught.value.exit_code == 1
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: the model's configuration"):
        read_source(tmp_path)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_the_family_is_told_by_the_tensors(tmp_path: Path, case: str) -> None:
    """config.json without `family`, and the one .safetensors file has a name of its own."""
    source = golden_source(case)
    folder = _write_run(tmp_path / "run", source)
    (folder / "config.json").write_text(json.dumps(source.config))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    for path in (folder, folder / "weights.safetensors"):
        found = read_source(path)
        assert found.family == source.family
        assert found.config == source.config
        assert found.tensors.keys() == source.tensors.keys()
    save_file({"x": np.zeros(1, np.float32)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"found other\.safetensors, weights\.safetensors"):
        read_source(folder)


@pytest.mark.parametrize(
    "names", [["x"], ["router.weight", "shared.w1", "token_embedding.weight"], []]
)
def test_a_family_that_the_tensors_do_not_tell(tmp_path: Path, names: list[str]) -> None:
    tensors = {name: np.zeros(1, np.float32) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="family: expected one of") as caught:
        read_source(tmp_path)
    assert all(name in str(caught.value) for name in names)
    assert 'Add "family"' in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"config\.note: expected a finite number, found nan"),
        ([1, {"deep": float("-inf")}], r"config\.note\[1\]\.deep: expected a finite number"),
        (10**400, r"config\.note: expected a number of 64 bits, found one of 1329"),
    ],
)
def test_a_number_json_cannot_hold_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    source = golden_source("moe_six")
    source = replace(source, config=source.config | {"note": value})
    with pytest.raises(ConfigError, match=message):
        export_package(source, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_parity_catches_a_package_that_computes_something_else(tmp_path: Path, case: str) -> None:
    from evermind_runtime.parity import parity_problems

    source = golden_source(case)

    def liar(config: Any, tensors: Any) -> Any:
        honest = parity_reference(source.family)(config, tensors)
        return lambda inputs: {
            name: array * 1.001 if array.dtype == np.float32 else array
            for name, array in honest(inputs).items()
        }

    export_package(source, tmp_path / "p", reference=liar)
    with open_package(tmp_path / "p") as package:
        problems = parity_problems(package)
    assert any("expected within 1e-05" in one.message for one in problems)


def test_random_models_agree_with_torch(tmp_path: Path) -> None:
    """Beyond the golden cases: odd dims, deep windows, every routing width."""
    rng = np.random.default_rng(5)
    for number in range(6):
        experts = int(rng.integers(1, 9))
        config = {
            "vocabSize": int(rng.integers(2, 50)),
            "dModel": int(rng.integers(1, 20)),
            "numLayers": int(rng.integers(1, 4)),
            "convKernel": int(rng.integers(1, 9)),
            "hiddenDim": int(rng.integers(1, 20)),
            "numExperts": experts,
            "topK": int(rng.integers(1, experts + 1)),
        }
        source = random_source("evermind-lm", config, seed=number)
        package = export(source, tmp_path / str(number), dtype="f32", parity=True)
        with open_package(package) as opened:
            from evermind_runtime.parity import parity_problems

            assert parity_problems(opened) == [], config


def test_generation_matches_torch(tmp_path: Path) -> None:
    from evermind_pack.models import EvermindLM, generate

    source = lm_source()
    torch_model = EvermindLM.from_tensors(source.config, source.tensors).double()
    package = export(source, tmp_path / "p", dtype="f32")
    with em.load(package) as model:
        for temperature in (0.0, 1.3):
            expected = generate(
                torch_model, [9, 8, 7], max_new_tokens=24, temperature=temperature, seed=4
            )
            pieces = model.generate([9, 8, 7], max_new_tokens=24, temperature=temperature, seed=4)
            assert [piece.token for piece in pieces] == list(expected)


def test_peer_files_of_every_precision_are_told_apart_by_content(tmp_path: Path) -> None:
    for case, stem in (("moe_six", "moe"), ("lm_small", "lm"), ("limbic_small", "limbic")):
        for version in ("v1", "v2"):
            data = (GOLDEN / case / f"{stem}.{version}.bin").read_bytes()
            path = tmp_path / "model"
            path.write_bytes(data)
            source = read_source(path)
            checkpoint = read_checkpoint(data, "x")
            assert source.family == checkpoint.family
            assert all(
                np.array_equal(source.tensors[name], array)
                for name, array in checkpoint.tensors.items()
            )


def test_models_and_exporters_know_the_same_families() -> None:
    from evermind_exporters.families import FAMILIES

    assert FAMILIES.keys() == MODELS.keys()
    assert all(
        family.storages[0] == "f16" for family in FAMILIES.values() if family.name != "tilelli"
    )


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_large_half_precision_experts_are_cast_in_blocks(tmp_path: Path, dtype: str) -> None:
    """9000 x 128 weights make three blocks of rows; both programs agree with torch."""
    from evermind_runtime.parity import parity_problems

    config = {"modelDim": 128, "hiddenDim": 9000, "numExperts": 3, "topK": 2}
    source = random_source("shared-expert-moe", config)
    package = export(source, tmp_path / "p", dtype=dtype, parity=True)
    graph = onnx.load(package / "graphs" / "experts.onnx", load_external_data=False).graph
    scans = [node for node in graph.node if node.op_type == "Scan"]
    assert len(scans) == 2 * 2  # two experts, two matrices each
    with open_package(package) as opened:
        assert parity_problems(opened) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["router.weight", "experts.1.linears.0.weight"])
def test_a_weight_that_is_not_finite_is_refused_and_named(
    tmp_path: Path, name: str, bad: float
) -> None:
    source = read_source(Path("tokitai-moe:nano"))
    array = source.tensors[name].copy()
    array.flat[3] = bad
    source = replace(source, tensors={**source.tensors, name: array})
    for dtype in ("f16", "f32"):
        with pytest.raises(ExportError, match=rf"{name}: expected finite weights, found 1 of "):
            export_package(source, tmp_path / "p", ExportOptions(dtype=dtype))
    assert not (tmp_path / "p").exists()


def test_a_double_that_is_no_single_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.array([1.0, -1e300]), "b": np.array([1e30])}, tmp_path / "d.safetensors")
    file = SafetensorsFile(tmp_path / "d.safetensors")
    assert file["b"].dtype == np.float32
    with pytest.raises(CheckpointError, match=r"a: expected numbers that float32 holds.*1e\+300"):
        file["a"]


def test_a_reference_that_is_not_finite_proves_nothing() -> None:
    source = read_source(Path("tokitai-moe:nano"))

    def reference(*_: Any) -> Any:
        return lambda inputs: {"logits": np.full((1, 20), np.nan, np.float32)}

    family = FAMILIES[source.family]
    with pytest.raises(ExportError, match=r"parity\.json: logits: expected finite numbers"):
        parity_file(family, source.config, source.tensors, reference)
