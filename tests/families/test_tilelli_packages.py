"""Tilelli packages: the reference's numbers through the command line, and paging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters import read_source
from evermind_exporters.checkpoints import ternary
from evermind_manifests.errors import CheckpointError, ConfigError
from evermind_manifests.package import open_package
from evermind_manifests.validate import validate
from evermind_runtime.parity import parity_problems
from evermind_runtime.trace import read_trace

from evermind_pack.cli import main
from evermind_pack.models import TilelliBlockModel
from tests.golden_families import family_case
from tests.packages import write_model

from .tilelli import BLOCKS, LM, golden_model, package, random_model

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

STORAGES = ["ternary2", "f16", "bf16"]
WIDE = {
    "family": "tilelli", "module": "lm", "vocab_size": 256, "d_model": 40, "n_layers": 2,
    "d_head": 8, "pathways": 5, "n_banks": 3, "top_k_routing": 3, "wide_kernel_size": 7,
    "skip_threshold": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model with five pathways of three banks, two layers, top-3."""
    folder = tmp_path_factory.mktemp("banks")
    return package(random_model(folder / "m", WIDE), folder / "p", parity=True)


@pytest.mark.parametrize("name", [*BLOCKS, LM])
def test_the_command_line_gives_the_golden_outputs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`export`, then `run --inputs`: a batch of rows, each with a state of its own."""
    case = family_case(name)
    source, inputs = golden_model(tmp_path / "m", name), tmp_path / "in.npz"
    np.savez(inputs, **case.inputs)
    assert main(["export", str(source), "-o", str(tmp_path / "p"), "--json"]) == 0
    assert main(["validate", str(tmp_path / "p"), "--deep", "--run", "-q"]) == 0
    for steps in ("prefill", "decode"):
        out = tmp_path / f"{steps}.npz"
        command = ["run", str(tmp_path / "p"), "--inputs", str(inputs), "--outputs", str(out)]
        assert main([*command, "--steps", steps, "--json"]) == 0
        with np.load(out) as found:
            for key in _compared(name):
                case.close(key, found[key], case.outputs[key])
    capsys.readouterr()


def _compared(name: str) -> set[str]:
    """The outputs that a case and its package both have."""
    if name == LM:
        blocks = {f"block{i}/{key}" for i in (0, 1) for key in ("forward", "router", "entropy")}
        return {"logits", "embed", *blocks}
    router = {"router_weights", "router_probs", "router_after_topk", "router_entropy"}
    banks = {"bank_idx", "pathway_weights"} if "_b4_" in name else set()
    return {"forward", "h", *router, *banks}


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("name", ["tilelli_block_p5_b1_k2", LM])
def test_every_storage_computes_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    """Trits are exact in all of them."""
    case = family_case(name)
    path = package(golden_model(tmp_path / "m", name), tmp_path / "p", dtype=dtype, parity=True)
    assert validate(path, deep=True, run=parity_problems).ok
    inputs = {"tokens" if key == "ids" else key: value for key, value in case.inputs.items()}
    with em.load(path) as model:
        assert model.manifest.config["storage"] == dtype
        found = model.forward(inputs)
    for key in _compared(name):
        case.close(key, found[key], case.outputs[key])


@pytest.mark.parametrize("option", ["per_row", "fp_attention"])
@pytest.mark.parametrize("dtype", ["ternary", "ternary2"])
def test_variants_agree_with_torch(option: str, dtype: str, tmp_path: Path) -> None:
    """The parity file holds what torch computes in double precision."""
    config = {**WIDE, option: True, "d_model": 24, "vocab_size": 50}
    source = random_model(tmp_path / "m", config)
    path = package(source, tmp_path / "p", dtype=dtype, parity=True)
    report = validate(path, deep=True, run=parity_problems)
    assert report.ok, report.render()


@pytest.mark.parametrize("threshold", [0.05, 0.3])
@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_infer_leaves_out_what_is_below_the_threshold(
    tmp_path: Path, threshold: float, steps: Any
) -> None:
    name = "tilelli_block_p5_b1_k0"
    case = family_case(name)
    options = {"semantics": "infer", "skip_mode": "per_token", "skip_threshold": threshold}
    path = package(golden_model(tmp_path / "m", name, **options), tmp_path / "p")
    key = f"infer_per_token_{threshold}"
    zeroed = case.expected[f"skipped_per_token_{threshold}"]["zeroed_weights"]
    with em.load(path) as model:
        model.trace(tmp_path / "t.jsonl")
        case.close(key, model.forward(case.inputs, steps=steps)["infer"], case.outputs[key])
    trace = read_trace(tmp_path / "t.jsonl")
    rows = [row for step in trace.steps for row in step.tokens]
    assert sum(len(row) == 0 for row in rows) == zeroed
    assert len(rows) == 5 * 22


def test_infer_without_threshold(tmp_path: Path) -> None:
    for name in ("tilelli_block_p3_b1_k2", "tilelli_block_p5_b4_k2"):
        case = family_case(name)
        source = golden_model(tmp_path / name, name, semantics="infer", skip_threshold=0)
        with em.load(package(source, tmp_path / f"{name}.p")) as model:
            case.close("infer", model.forward(case.inputs)["infer"], case.outputs["infer"])


def test_only_units_with_weight_are_read(tmp_path: Path) -> None:
    name = "tilelli_block_p5_b4_k2"
    case = family_case(name)
    path = package(golden_model(tmp_path / "m", name), tmp_path / "p")
    entries = case.expected["units_used_by_forward"]
    pathways = ["local", "wide", "state", "sparse", "dense"]
    with em.load(path) as model:
        model.trace(tmp_path / "t.jsonl")
        model.forward(case.inputs)
        assert model.stats().expert_misses == sum(e["tokens_with_weight"] > 0 for e in entries)
    counts: dict[str, int] = {}
    for step in read_trace(tmp_path / "t.jsonl").steps:
        for row in step.tokens:
            for bank in row:
                unit = f"{pathways[step.layer]}.{bank}"
                counts[unit] = counts.get(unit, 0) + 1
    assert counts == {
        e["unit"]: e["tokens_with_weight"] for e in entries if e["tokens_with_weight"]
    }


@pytest.mark.parametrize("name", BLOCKS)
def test_a_prefix_and_a_continued_state(name: str, tmp_path: Path) -> None:
    case = family_case(name)
    length = case.expected["prefix_len"]
    with em.load(package(golden_model(tmp_path / "m", name), tmp_path / "p")) as model:
        for row, x in enumerate(case.inputs["x"]):
            for steps in ("prefill", "decode"):
                state = model.new_state()
                first = model.forward({"x": x[:length]}, state=state)["forward"]
                case.close("forward_prefix", first, case.outputs["forward_prefix"][row])
                rest = model.forward({"x": x[length:]}, state=state, steps=steps)["forward"]
                case.close("forward", rest, case.outputs["forward"][row, length:])


def test_paged_and_unpaged_give_the_same_bits(banks: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 256, 40)
    found = []
    for budget in (None, "7%"):
        with em.load(banks, budget=budget) as model:
            state = model.new_state()
            first = model.forward({"tokens": tokens[:30]}, state=state)["logits"]
            then = model.forward({"tokens": tokens[30:]}, state=state, steps="decode")["logits"]
            found.append(np.concatenate([first, then]))
            assert model.stats().evictions > 0 or budget is None
    np.testing.assert_array_equal(*found)


def test_chunks_and_single_tokens_agree(banks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(2).integers(0, 256, 50)
    with em.load(banks) as model:
        whole = model.forward({"tokens": tokens})["logits"]
        single = model.forward({"tokens": tokens}, steps="decode")["logits"]
        monkeypatch.setattr("evermind_runtime.model.PREFILL_CHUNK", 16)
        chunks = model.forward({"tokens": tokens})["logits"]
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-4)
    np.testing.assert_allclose(chunks, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("decay", [-0.9, 0.0, 0.3, 6.0])
def test_a_replayed_state_is_exact(decay: float, tmp_path: Path) -> None:
    """However long the context, and whatever sign the decay has."""
    config = {"module": "block", "d_model": 8, "pathways": 3, "d_head": 4}
    model = TilelliBlockModel(config)
    tensors = model.to_tensors()
    tensors["state.a_raw"] = np.full(8, decay, np.float32)
    # The router sees nothing, so every pathway has a third of the weight.
    tensors["router.weight"] = np.zeros((3, 8), np.float32)
    source = write_model(tmp_path / "m", {**config, "family": "tilelli"}, tensors)
    x = np.random.default_rng(4).normal(size=(600, 8)).astype(np.float32)
    with em.load(package(source, tmp_path / "p")) as loaded:
        whole = loaded.forward({"x": x})["forward"]
        state = loaded.new_state()
        loaded.forward({"x": x[:590]}, state=state, outputs=[])
        last = loaded.forward({"x": x[590:]}, state=state, steps="decode")["forward"]
    np.testing.assert_allclose(last, whole[590:], rtol=0, atol=1e-4)


def test_shards_are_the_packed_trits_of_the_weights(tmp_path: Path) -> None:
    name = "tilelli_block_p5_b4_k0"
    case = family_case(name)
    path = package(golden_model(tmp_path / "m", name), tmp_path / "p")
    with open_package(path) as opened:
        manifest = opened.manifest
        assert [(layer.kind, layer.experts) for layer in manifest.layers] == [
            ("local", 4), ("wide", 4), ("state", 4), ("sparse", 4), ("dense", 4)
        ]  # fmt: skip
        scopes = {name: kind.scope for name, kind in manifest.kinds.items()}
        assert scopes.pop("dense") == "token"
        assert set(scopes.values()) == {"sequence"}
        shard = opened.read_shard(4, 2)
        state = opened.read_shard(2, 1)
    used = ternary.ternarise(case.weights["dense.2.down.weight"])
    np.testing.assert_array_equal(shard.array("down.weight.alpha"), used.alpha)
    packed = shard.array("down.weight")
    assert packed.shape == (24, 10)
    for row, data in zip(used.codes, packed, strict=True):
        np.testing.assert_array_equal(ternary.unpack_base3(data, 48, "row"), row)
    np.testing.assert_array_equal(state.array("a_raw"), case.weights["state.1.a_raw"])


def test_a_ternary_package_is_seven_times_smaller(tmp_path: Path) -> None:
    config = {
        "family": "tilelli", "module": "lm", "d_model": 128, "n_layers": 1, "d_head": 32,
        "pathways": 5,
    }  # fmt: skip
    source = random_model(tmp_path / "m", config)
    sizes = {}
    for dtype in ("ternary", "f16"):
        with open_package(package(source, tmp_path / dtype, dtype=dtype)) as opened:
            sizes[dtype] = sum(shard.bytes for shard in opened.manifest.shards)
            card = opened.read_file("README.md").decode()
            assert "active per token" in card
            assert "experts | 5 shards" in card
    assert sizes["f16"] >= 7 * sizes["ternary"]


def test_text_is_bytes(banks: Path) -> None:
    with em.load(banks) as model:
        assert model.manifest.tokenizer is not None
        pieces = list(model.generate("Hi", max_new_tokens=5))
        assert len(pieces) == 5
        context = [*b"Hi"]
        for piece in pieces:
            logits = model.forward({"tokens": context})["logits"][-1]
            assert piece.token == int(logits.argmax())
            context.append(piece.token)


def test_greedy_tokens_of_a_sliding_window(tmp_path: Path) -> None:
    """The reference runs the last `max_seq` tokens anew for every token."""
    case = family_case(LM)
    settings = case.expected["greedy"]
    expected = case.outputs["greedy"][0].tolist()
    tokens = expected[: settings["prompt_len"]]
    with em.load(package(golden_model(tmp_path / "m", LM), tmp_path / "p")) as model:
        for _ in range(settings["n_new"]):
            window = tokens[-settings["max_seq"] :]
            tokens.append(int(model.forward({"tokens": window})["logits"][-1].argmax()))
    assert tokens == expected


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = golden_model(tmp_path / "m", LM)
    with pytest.raises(ConfigError, match=r"stored as one of ternary, ternary2.*found 'q4'"):
        package(source, tmp_path / "p", dtype="q4")
    with pytest.raises(ConfigError, match="truncate"):
        package(source, tmp_path / "p", dtype="f16", rounding="truncate")
    with pytest.raises(CheckpointError, match="one magnitude"):
        package(golden_model(tmp_path / "w", LM, weights="ternary"), tmp_path / "p")
    assert not (tmp_path / "p").exists()
    raw = json.loads((source / "config.json").read_text())
    del raw["family"]
    (source / "config.json").write_text(json.dumps(raw))
    assert read_source(source).family == "tilelli"
    assert read_source(source).config["module"] == "lm"


def test_weights_that_are_ternary_already(tmp_path: Path) -> None:
    case = family_case(LM)
    used = {
        name: ternary.ternarise(array).values() if array.ndim > 1 else array
        for name, array in case.weights.items()
    }
    config = {**case.config, "family": "tilelli", "weights": "ternary"}
    path = package(write_model(tmp_path / "m", config, used), tmp_path / "p", parity=True)
    assert validate(path, deep=True, run=parity_problems).ok
    with em.load(path) as model:
        found = model.forward({"tokens": case.inputs["ids"]})["logits"]
    case.close("logits", found, case.outputs["logits"])
