"""There and back: a peer's file, a package of ours, the same file again, byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from evermind_exporters import (
    ExportOptions,
    ModelSource,
    convert_package,
    convert_to_bundle,
    export_package,
    read_source,
    write_file,
    write_folder,
)
from evermind_exporters.checkpoints import (
    Checkpoint,
    canonical_shapes,
    new_peer_manifest,
    read_evermind,
    read_evl0,
    read_lmbc,
    validate_config,
    write_evermind,
    write_evl0,
    write_lmbc,
    write_moe0,
    write_peer_safetensors,
)
from evermind_manifests import open_package
from evermind_manifests.errors import CheckpointError, ConfigError, ExportError
from evermind_manifests.manifest import Card
from evermind_manifests.validate import validate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.packages import GOLDEN, LM_CONFIG, random_source

WRITERS = {
    "shared-expert-moe": ("moe0", write_moe0),
    "evermind-lm": ("evl0", write_evl0),
    "limbic": ("lmbc", write_lmbc),
}
CHECKPOINTS = sorted(
    path
    for path in GOLDEN.glob("*/*.bin")
    if path.name.endswith((".v1.bin", ".v2.bin", ".legacy.bin"))
)
PACKAGES = sorted(GOLDEN.glob("*/model.evermind"))


def there(source: Path | ModelSource, folder: Path, half: bool, **options) -> Path:
    package = folder / "package"
    model = source if isinstance(source, ModelSource) else read_source(source)
    export_package(model, package, ExportOptions(dtype="f16" if half else "f32", **options))
    return package


def back(package: Path, target: str, **options) -> bytes:
    with open_package(package) as opened:
        return convert_package(opened, target, **options)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_golden_checkpoint_comes_back(path, tmp_path):
    half = ".v2." in path.name
    package = there(path, tmp_path, half)
    with open_package(package) as opened:
        target, _ = WRITERS[opened.manifest.family]
        # A limbic package has no experts whose dtype could tell.
        precision = half if target == "lmbc" else None
        again = convert_package(opened, target, half=precision, trailer=".legacy." not in path.name)
    assert again == path.read_bytes()


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.parent.name)
def test_every_golden_evermind_file_comes_back(path, tmp_path):
    half = json.loads((path.parent / "case.json").read_text())["manifest"]["checkpointFp16"]
    package = there(path, tmp_path, half)
    report = validate(package, deep=True)
    assert report.ok, report.render()
    assert back(package, "evermind") == path.read_bytes()


def test_truncation_gives_the_peers_half_file(tmp_path):
    for case, stem, target in [
        ("moe_six", "moe", "moe0"),
        ("lm_small", "lm", "evl0"),
        ("limbic_default", "limbic", "lmbc"),
    ]:
        package = there(GOLDEN / case / f"{stem}.v1.bin", tmp_path / case, False)
        expected = (GOLDEN / case / f"{stem}.v2.bin").read_bytes()
        assert back(package, target, half=True, rounding="truncate") == expected
        assert back(package, target, half=True) != expected


def test_an_export_that_truncates_gives_the_peers_half_file(tmp_path):
    package = there(GOLDEN / "lm_small" / "lm.v1.bin", tmp_path, True, rounding="truncate")
    assert back(package, "evl0") == (GOLDEN / "lm_small" / "lm.v2.bin").read_bytes()


@pytest.mark.parametrize("target", ["safetensors", "gguf"])
def test_exports_are_the_peers(tmp_path, target):
    folder = GOLDEN / "export_lm"
    package = there(folder / "lm.v1.bin", tmp_path, False, name="Tiny")
    assert back(package, target) == (folder / f"model.{target}").read_bytes()
    half = back(package, target, half=True, rounding="truncate")
    assert half == (folder / f"model.f16.{target}").read_bytes()


def test_the_peers_bundle_is_read(tmp_path):
    # A bundle has no f16 marker in config.json: the file's own dtypes count.
    source = read_source(GOLDEN / "export_lm")
    config = json.loads((GOLDEN / "export_lm/case.json").read_text())["resolved_config"]
    assert source.config == config
    assert source.tokenizer is not None
    assert b"ignore_merges" in source.tokenizer
    package = there(source, tmp_path, False)
    assert back(package, "evl0") == (GOLDEN / "export_lm/lm.v1.bin").read_bytes()


def test_the_peers_bundle_comes_back(tmp_path):
    folder = GOLDEN / "export_lm"
    package = there(folder, tmp_path, False)
    with open_package(package) as opened:
        files = convert_to_bundle(opened)
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert files[name] == (folder / name).read_bytes()
    write_folder(tmp_path / "bundle", files)
    again = read_source(tmp_path / "bundle")
    assert again.config == read_source(folder).config
    assert again.tokenizer == files["tokenizer.json"]
    with pytest.raises(ExportError, match="exists already"):
        write_folder(tmp_path / "bundle", files)
    with pytest.raises(ExportError, match="cannot be written"):
        write_folder(tmp_path / "no" / "bundle", files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "package"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": None}, "topK: expected an integer"),
        ({"num_experts_per_tok": 5}, "topK: expected at most"),
        ({"vocab_size": 25}, r"vocab_size: expected 24 \(the tensors\), found 25"),
        ({"hidden_size": 9}, "hidden_size: expected 8"),
    ],
)
def test_a_bundle_that_contradicts_itself_is_refused(tmp_path, change, message):
    config = json.loads((GOLDEN / "export_lm/config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(
        (GOLDEN / "export_lm/model.f16.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=message):
        read_source(tmp_path)


def test_a_bundle_needs_top_k_and_tensors_that_tell_the_rest(tmp_path):
    config = json.loads((GOLDEN / "export_lm/config.json").read_text())
    del config["num_experts_per_tok"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((GOLDEN / "export_lm/model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="the tensors do not tell it"):
        read_source(weights)
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"token_embedding\.weight: expected a tensor"):
        read_source(weights)


def test_a_vocabulary_of_123_tokens_is_no_json_header(tmp_path):
    source = random_source("evermind-lm", {**LM_CONFIG, "vocabSize": 123, "numLayers": 1})
    data = write_evl0(Checkpoint(source.family, source.config, dict(source.tensors)))
    assert data[8:9] == b"{"
    (tmp_path / "model").write_bytes(data)
    assert read_source(tmp_path / "model").config["vocabSize"] == 123


def test_name_version_card_and_unknown_keys_survive_and_can_be_changed(tmp_path, golden):
    case = golden("pkg_lm_f32")
    file = read_evermind(case.bytes("model.evermind"), "m")
    manifest = file.manifest.update({"price": {"eur": 3}, "x": None})
    path = tmp_path / "model.evermind"
    path.write_bytes(write_evermind(file.checkpoint, manifest))
    package = there(path, tmp_path, False)
    with open_package(package) as opened:
        ours = opened.manifest
    assert (ours.name, ours.version, ours.created) == ("tiny-lm", "1.2.3", "2026-06-27T00:00:00Z")
    assert ours.card == Card(
        description="A test model",
        training_summary="none",
        license="MIT",
        author="Zoë «q» 漢字 😀",
        tags=("a", 'b"c', "back\\slash"),
    )
    assert back(package, "evermind") == path.read_bytes()

    renamed = there(
        path, tmp_path / "other", False, name="new", version="2", card=Card(license="Apache-2.0")
    )
    again = read_evermind(back(renamed, "evermind"), "m").manifest.values
    expected = dict(manifest.values) | {"name": "new", "version": "2"}
    expected["card"] = {**expected["card"], "license": "Apache-2.0"}
    assert again == expected
    assert list(again) == list(expected)


def test_a_model_that_never_was_in_the_peer_gets_a_manifest(tmp_path):
    source = random_source("evermind-lm", {**LM_CONFIG, "seed": 3})
    package = there(source, tmp_path, True, card=Card(description="d", author="A"))
    file = read_evermind(back(package, "evermind"), "m")
    assert file.checkpoint.half
    assert file.manifest.values["config"] == LM_CONFIG
    assert file.manifest.values["card"] == {"description": "d", "author": "A"}
    assert "createdAt" not in file.manifest.values


def test_a_seed_and_extras_of_an_moe_config_survive(tmp_path):
    source = random_source(
        "shared-expert-moe",
        {"modelDim": 3, "hiddenDim": 2, "numExperts": 2, "topK": 2, "seed": -1, "note": "n"},
    )
    manifest = new_peer_manifest(
        source.family, source.config, name="n", version="1", card=Card(), created=None
    )
    data = write_evermind(Checkpoint(source.family, source.config, dict(source.tensors)), manifest)
    path = tmp_path / "m.evermind"
    path.write_bytes(data)
    assert back(there(path, tmp_path, False), "evermind") == data


def test_a_name_we_cannot_have_stays_the_peers(tmp_path, golden):
    file = read_evermind(golden("pkg_moe_f32").bytes("model.evermind"), "m")
    for number, name in enumerate(("", "x" * 300)):
        data = write_evermind(file.checkpoint, file.manifest.update({"name": name}))
        path = tmp_path / f"named{number}.evermind"
        path.write_bytes(data)
        package = there(path, tmp_path / str(number), False)
        with open_package(package) as opened:
            assert opened.manifest.name == f"named{number}"
        assert back(package, "evermind") == data


def test_a_target_that_cannot_hold_the_model_is_refused(tmp_path):
    package = there(GOLDEN / "limbic_small/limbic.v1.bin", tmp_path, False)
    with pytest.raises(ConfigError, match=r"cannot be written as evermind\n  It fits: lmbc\."):
        back(package, "evermind")


def test_another_family_is_refused(tmp_path):
    package = there(GOLDEN / "moe_small/moe.v1.bin", tmp_path, False)
    with open_package(package) as opened:
        opened.manifest = msgspec.structs.replace(opened.manifest, family="synapse")
        with pytest.raises(ConfigError, match="found 'synapse'"):
            convert_package(opened, "moe0")


def test_a_weight_too_large_for_a_half_is_refused(tmp_path):
    source = random_source("shared-expert-moe", {"modelDim": 2, "hiddenDim": 2, "numExperts": 2})
    source.tensors["router.weight"][0, 0] = 1e6
    package = there(source, tmp_path, False)
    with pytest.raises(ExportError, match="do not fit f16"):
        back(package, "moe0", half=True)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.moe0"
    write_file(path, b"one")
    with pytest.raises(ExportError, match="exists already"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one"
    write_file(path, b"two", overwrite=True)
    assert path.read_bytes() == b"two"
    with pytest.raises(ExportError, match="cannot be written"):
        write_file(tmp_path / "no" / "x.moe0", b"one")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="cannot be written"):
        write_file(tmp_path / "folder", b"one", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x.moe0"]


DIMS = st.integers(1, 7)
CONFIGS = st.one_of(
    st.tuples(
        st.just("shared-expert-moe"),
        st.fixed_dictionaries({"modelDim": DIMS, "hiddenDim": DIMS, "numExperts": DIMS}),
    ),
    st.tuples(
        st.just("evermind-lm"),
        st.fixed_dictionaries(
            {
                "vocabSize": DIMS,
                "dModel": DIMS,
                "numLayers": st.integers(1, 3),
                "convKernel": st.integers(1, 4),
                "hiddenDim": DIMS,
                "numExperts": DIMS,
            }
        ),
    ),
    st.tuples(
        st.just("limbic"),
        st.fixed_dictionaries({"inputDim": DIMS, "hiddenDim": DIMS, "stateDim": DIMS}),
    ),
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(CONFIGS, st.booleans(), st.data())
def test_any_model_comes_back(tmp_path_factory, model, half, data):
    family, config = model
    if "numExperts" in config:
        config["topK"] = data.draw(st.integers(1, config["numExperts"]))
    resolved = validate_config(family, config)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in canonical_shapes(family, resolved).items()
    }
    target, write = WRITERS[family]
    original = write(Checkpoint(family, resolved, tensors), half)
    folder = tmp_path_factory.mktemp("model")
    (folder / "peer").write_bytes(original)
    package = there(folder / "peer", folder, half)
    assert back(package, target, half=half) == original


def test_readers_agree_with_the_file_on_disk(golden, tmp_path):
    """`read_source` reads tensor by tensor; the readers in memory read all at once."""
    for path, read in (
        (GOLDEN / "lm_small/lm.v2.bin", read_evl0),
        (GOLDEN / "limbic_small/limbic.v1.bin", read_lmbc),
    ):
        found = read_source(path)
        expected = read(path.read_bytes(), "m")
        assert list(found.tensors) == list(expected.tensors)
        for name, tensor in expected.tensors.items():
            np.testing.assert_array_equal(found.tensors[name], tensor)


def test_peer_safetensors_reads_back(tmp_path):
    checkpoint = read_evl0((GOLDEN / "export_lm/lm.v1.bin").read_bytes(), "m")
    config = (GOLDEN / "export_lm/config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(write_peer_safetensors(checkpoint))
    source = read_source(tmp_path)
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(source.tensors[name], tensor)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"peer/manifest.json": b"{}"}, r"peer/manifest\.json: manifest: schema: expected"),
        ({"peer/codec.safetensors": b"nothing"}, r"peer/codec\.safetensors: "),
        ({"peer/codec.safetensors": None}, "a media model's codec section is missing"),
    ],
)
def test_attachments_that_are_not_ours_are_refused(tmp_path, damage, message):
    source = read_source(GOLDEN / "pkg_media" / "model.evermind")
    kept = {name: data for name, data in (source.attachments | damage).items() if data}
    package = there(replace(source, attachments=kept), tmp_path, True)
    with pytest.raises(CheckpointError, match=message):
        back(package, "evermind")


def test_a_manifest_of_another_model_is_refused(tmp_path):
    other = read_source(GOLDEN / "pkg_lm_f32" / "model.evermind")
    source = read_source(GOLDEN / "lm_small" / "lm.v1.bin")
    package = there(replace(source, attachments=other.attachments), tmp_path, False)
    with pytest.raises(CheckpointError, match=r"\.evermind: vocabSize: expected"):
        back(package, "evermind")
