"""A peer's file, paged from where it lies, is the package an export would have made."""

from __future__ import annotations

import importlib.metadata
import json
from importlib.metadata import EntryPoint

import evermind_runtime as em
import numpy as np
import onnxruntime
import pytest
from evermind_exporters import ExportOptions, export_package, read_source
from evermind_exporters.checkpoints import Checkpoint, write_evl0
from evermind_exporters.peer_pages import PeerStore, open_peer_file
from evermind_manifests.errors import (
    BudgetError,
    CheckpointError,
    ClosedError,
    LocationError,
    ManifestError,
    MissingExtraError,
    MissingFileError,
    ShardDigestError,
    TruncatedError,
)
from evermind_manifests.package import open_package
from evermind_manifests.validate import validate
from evermind_runtime import openers

from evermind_pack.cli import main
from tests.packages import GOLDEN, LM_CONFIG, lm_source, random_source

FILES = sorted(
    [
        *GOLDEN.glob("*_small/*.bin"),
        *GOLDEN.glob("pkg_*/model.evermind"),
        GOLDEN / "limbic_default" / "limbic.v2.bin",
        GOLDEN / "lm_default" / "lm.v2.bin",
        GOLDEN / "moe_default" / "moe.v2.bin",
    ]
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_is_the_package_an_export_makes(path, tmp_path):
    with open_peer_file(path) as virtual:
        dtype = (
            next(iter(virtual.manifest.kinds.values())).tensors[0].dtype
            if (virtual.manifest.kinds)
            else "f32"
        )
        export_package(read_source(path), tmp_path / "p", ExportOptions(dtype=dtype))
        with open_package(tmp_path / "p") as real:
            ours, theirs = virtual.manifest, real.manifest
            assert ours.shards == theirs.shards
            assert ours.plan == theirs.plan
            assert ours.card == theirs.card
            assert {**ours.files} == {
                name: entry for name, entry in theirs.files.items() if name != "README.md"
            }
            for name, entry in ours.files.items():
                assert virtual.store.read(name, limit=entry.bytes) == real.store.read(
                    name, limit=entry.bytes
                )
            for shard in ours.shards:
                one = virtual.read_shard(shard.layer, shard.expert)
                other = real.read_shard(shard.layer, shard.expert)
                assert one.header == other.header


@pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")
@pytest.mark.parametrize("half", [False, True])
def test_it_computes_the_same_under_any_budget(tmp_path, half):
    source = lm_source()
    path = tmp_path / "model.evl0"
    path.write_bytes(
        write_evl0(Checkpoint(source.family, source.config, dict(source.tensors)), half)
    )
    dtype = "f16" if half else "f32"
    export_package(read_source(path), tmp_path / "p", ExportOptions(dtype=dtype))
    tokens = np.arange(40) * 7 % LM_CONFIG["vocabSize"]
    with em.load(tmp_path / "p", plan="half") as model:
        expected = model.forward({"tokens": tokens})["logits"]
        text = [piece.token for piece in model.generate([1, 2], max_new_tokens=12)]
    for budget in ("100%", "30%", "10%"):
        with em.load(path, budget=budget) as model:
            np.testing.assert_array_equal(model.forward({"tokens": tokens})["logits"], expected)
            stats = model.stats()
            assert stats.peak_resident_expert_bytes <= model.budget
            assert stats.expert_misses > 0
    with em.load(path, budget="50%") as model:
        assert [piece.token for piece in model.generate([1, 2], max_new_tokens=12)] == text
    with pytest.raises(BudgetError, match="cannot hold the experts of one step"):
        em.load(path, budget=100)


def test_golden_numbers_from_an_evermind_file():
    for name in ("pkg_lm_f32", "pkg_lm_fp16", "pkg_media"):
        case = json.loads((GOLDEN / name / "case.json").read_text())
        with em.load(GOLDEN / name / "model.evermind", budget="75%") as model:
            logits = model.forward({"tokens": case["tokens"]})["logits"][-1]
            np.testing.assert_allclose(
                logits, case["last_logits"], rtol=0, atol=2e-6 * np.abs(logits).max()
            )
            pieces = model.generate(case["tokens"], max_new_tokens=len(case["greedy"]))
            assert [piece.token for piece in pieces] == case["greedy"]
    for name in ("pkg_moe_f32", "pkg_moe_fp16"):
        case = json.loads((GOLDEN / name / "case.json").read_text())
        with em.load(GOLDEN / name / "model.evermind") as model:
            y = model.forward({"x": np.float32(case["inputs"])})["y"]
        expected = np.array([one["output"] for one in case["expected"]])
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_peers_own_onnx_export_gives_the_same_logits():
    case = json.loads((GOLDEN / "export_lm" / "case.json").read_text())
    tokens = np.array([case["tokens"]])
    with em.load(GOLDEN / "export_lm" / "lm.v1.bin", budget="50%") as model:
        logits = model.forward({"tokens": tokens})["logits"]
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        dense = onnxruntime.InferenceSession(str(GOLDEN / "export_lm" / "model.onnx"), options)
        expected = dense.run(None, {"input_ids": tokens})[0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * scale)
    np.testing.assert_allclose(logits[0], case["logits"], rtol=0, atol=2e-6 * scale)


def test_run_and_inspect_take_the_file(capsys):
    path = str(GOLDEN / "pkg_lm_f32" / "model.evermind")
    case = json.loads((GOLDEN / "pkg_lm_f32" / "case.json").read_text())
    tokens = ",".join(map(str, case["tokens"]))
    command = ["run", path, "--tokens", tokens, "--max-new", "12", "--budget", "50%", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == case["greedy"]
    assert main(["inspect", path, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["name"], summary["experts"]) == ("tiny-lm", 8)


def test_a_damaged_file_is_refused_before_anything_runs(tmp_path):
    path = tmp_path / "model.evermind"
    data = bytearray((GOLDEN / "pkg_lm_f32" / "model.evermind").read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checksum: expected \d+ \(manifest\)"):
        em.load(path)


def test_a_file_that_changes_under_us_is_noticed(tmp_path):
    path = tmp_path / "layer"
    data = bytearray((GOLDEN / "moe_small" / "moe.v1.bin").read_bytes())
    path.write_bytes(data)
    with em.load(path, plan="paged") as model:
        data[-4] ^= 1
        path.write_bytes(data)
        x = np.ones((8, model.manifest.config["modelDim"]), np.float32) * np.arange(-4, 4)[:, None]
        with pytest.raises(ShardDigestError, match=r"e0003\.moe0: sha256 mismatch"):
            model.forward({"x": x})
        path.write_bytes(data[:100])
        with pytest.raises(TruncatedError):
            model.forward({"x": x})


def test_the_store_behaves_like_any_other(tmp_path):
    with PeerStore(GOLDEN / "moe_small" / "moe.v1.bin") as store:
        path = "experts/l000/e0001.moe0"
        size = store.size(path)
        whole = store.read(path, limit=size)
        part = bytearray(50)
        store.read_into(path, 30, memoryview(part))
        assert bytes(part) == whole[30:80]
        dirty = bytearray(b"\xff" * size)
        store.read_into(path, 0, memoryview(dirty))
        assert bytes(dirty) == whole
        with pytest.raises(TruncatedError):
            store.read_into(path, size - 1, memoryview(bytearray(2)))
        with pytest.raises(MissingFileError):
            store.size("experts/l000/e0099.moe0")
        assert path in store.paths()
        resident = store.size("graphs/resident.safetensors")
        assert len(store.read("graphs/resident.safetensors", limit=resident)) == resident
    for read in (
        lambda: store.read(path, limit=size),
        lambda: store.read("manifest.json", limit=1 << 20),
        lambda: store.size("manifest.json"),
        lambda: store.paths(),
    ):
        with pytest.raises(ClosedError, match="the package is closed"):
            read()


def test_the_virtual_package_is_valid_to_the_last_digest():
    from evermind_manifests.deep import deep_problems

    with open_peer_file(GOLDEN / "pkg_media" / "model.evermind") as package:
        assert not list(deep_problems(package.store, package.manifest, lambda done, total: None))


def test_without_the_exporters_the_extra_is_named(monkeypatch, tmp_path):
    entry = EntryPoint("30456f4d", "no_such_module_here:open_it", openers.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, name: [entry])
    with pytest.raises(MissingExtraError, match=r"needs the Python package 'no_such_module_here'"):
        em.load(GOLDEN / "moe_small" / "moe.v1.bin")


def test_other_files_are_no_packages(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ManifestError, match="expected a package folder"):
        em.load(tmp_path / "text")
    with pytest.raises(LocationError):
        em.load(tmp_path / "nothing")
    assert not validate(tmp_path / "text").ok


def test_an_odd_half_file_has_misaligned_ranges_and_works(tmp_path):
    config = {"vocabSize": 5, "dModel": 3, "numLayers": 2, "hiddenDim": 3, "numExperts": 3}
    source = random_source("evermind-lm", {**config, "topK": 3, "convKernel": 1})
    path = tmp_path / "odd"
    path.write_bytes(
        write_evl0(Checkpoint(source.family, source.config, dict(source.tensors)), half=True)
    )
    with open_peer_file(path) as package:
        for layer in range(2):
            for expert in range(3):
                contents = package.read_shard(layer, expert)
                expected = source.tensors[f"layers.{layer}.moe.experts.{expert}.b1"]
                np.testing.assert_allclose(contents.array("b1"), expected, atol=1e-3)
