"""ATOME01, ATOME02 and ATOMEP3 files, and the reference's `.pt` checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
import torch
from evermind_exporters import read_source
from evermind_exporters.checkpoints import atome, ternary
from evermind_exporters.families import FAMILIES
from evermind_manifests.errors import CheckpointError, ConfigError
from hypothesis import given
from hypothesis import strategies as st

from tests.golden_families import FAMILY_CASES, family_case

from .tilelli import LM, package

FILES = {"ATOME01": "atome", "ATOME02": "atome2", "ATOMEP3": "atomep3"}
CHECKPOINT = "EVERMIND_PACK_ATOME_CHECKPOINT"


def lm_config(**config: Any) -> dict[str, Any]:
    return FAMILIES["tilelli"].resolve({"module": "lm", **config}, {})


CONFIG = lm_config(**family_case(LM).config)


def golden(version: str) -> bytes:
    return (FAMILY_CASES / f"{LM}.{FILES[version]}").read_bytes()


@pytest.mark.parametrize("version", atome.VERSIONS)
def test_written_files_are_the_reference_exporters(version: str) -> None:
    case = family_case(LM)
    file = atome.quantise_atome(version, CONFIG, case.weights)
    expected = case.expected["blobs"][version]
    # The reference sums in float32, in an order of its own: its alpha may differ in the last
    # bit, and is taken from where it comes from.
    for name, one in file.quantised.items():
        mean = torch.from_numpy(case.weights[name]).abs().mean().numpy().reshape(1)
        np.testing.assert_array_max_ulp(one.alpha, mean, 2)
        file.quantised[name] = ternary.Quantised(one.codes, mean)
    data = atome.write_atome(file, CONFIG)
    assert len(data) == expected["bytes"] == atome.atome_bytes(version, CONFIG)
    assert hashlib.sha256(data).hexdigest() == expected["sha256"]
    assert data == golden(version)


@pytest.mark.parametrize("version", atome.VERSIONS)
def test_reading_and_writing_back_is_exact(version: str) -> None:
    file = atome.read_atome(golden(version), CONFIG, "f")
    assert file.version == version
    assert atome.write_atome(file, CONFIG) == golden(version)


def test_read_weights_are_the_references() -> None:
    case = family_case(LM)
    tensors = atome.read_atome(golden("ATOME02"), CONFIG, "f").tensors()
    names = {"conv": "local.weight", "router": "router.proj.weight"}
    for key, expected in case.outputs.items():
        if not key.startswith("atome02/"):
            continue
        *block, kind = key.removeprefix("atome02/").split("/")
        if block:
            inner = names.get(kind, f"sparse.{kind}.weight")
            found = tensors[f"blocks.{block[0].removeprefix('block')}.{inner}"]
        else:
            found = tensors[f"{kind}.weight"]
        case.close(key, np.squeeze(found), _unturned(kind, expected))
    for name, weight in case.weights.items():
        if weight.ndim > 1:
            used = ternary.ternarise(weight).values()
            np.testing.assert_allclose(tensors[name], used, rtol=3e-7, atol=0)


def _unturned(kind: str, expected: np.ndarray) -> np.ndarray:
    """The fixture shows convolutions as the file has them: backwards in time."""
    return expected[:, ::-1] if kind == "conv" else expected


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({}, (20_575, 17_613, 27_999)),
        ({"d_model": 256, "n_layers": 8, "d_head": 64}, (276_655, 229_975, 393_391)),
    ],
)
def test_sizes_of_known_models(config: dict[str, Any], sizes: tuple[int, ...]) -> None:
    resolved = lm_config(**config)
    found = tuple(atome.atome_bytes(version, resolved) for version in atome.VERSIONS)
    assert found == sizes


@pytest.mark.parametrize("version", atome.VERSIONS)
@given(data=st.data())
def test_damage_is_refused_or_read_exactly(version: str, data: st.DataObject) -> None:
    damaged = bytearray(golden(version))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    raw = bytes(damaged[: len(damaged) - cut]) + bytes(data.draw(st.integers(0, 2)))
    try:
        file = atome.read_atome(raw, CONFIG, "f")
    except CheckpointError:
        return
    assert atome.write_atome(file, CONFIG) == raw


def test_what_is_no_such_file_is_refused() -> None:
    with pytest.raises(CheckpointError, match="magic"):
        atome.read_atome(b"ATOME09" + bytes(50), CONFIG, "f")
    with pytest.raises(CheckpointError, match="classifier"):
        atome.read_atome(b"ATOMECL01" + bytes(50), CONFIG, "f")
    with pytest.raises(CheckpointError, match="expected 1,383 bytes"):
        atome.read_atome(golden("ATOME01")[:-1], CONFIG, "f")
    for change in ({"pathways": 5}, {"n_banks": 2}, {"per_row": True}, {"fp_attention": True}):
        with pytest.raises(ConfigError, match="three pathways of one bank"):
            atome.read_atome(golden("ATOME01"), CONFIG | change, "f")
    file = atome.read_atome(golden("ATOME01"), CONFIG, "f")
    del file.vectors["final_norm.bias"]
    with pytest.raises(CheckpointError, match=r"'final_norm\.bias': expected shape"):
        atome.write_atome(file, CONFIG)


@pytest.mark.parametrize("version", atome.VERSIONS)
def test_files_become_packages(version: str, tmp_path: Path) -> None:
    case = family_case(LM)
    path = tmp_path / f"tiny.{FILES[version]}"
    path.write_bytes(golden(version))
    # Whatever the configuration says of the weights, the file has the last word.
    told = {"weights": "ternary"} if version == "ATOMEP3" else {"quantize": False}
    (tmp_path / "config.json").write_text(json.dumps(case.config | told))
    source = read_source(path)
    assert source.name == "tiny"
    with em.load(package(path, tmp_path / "p")) as model:
        logits = model.forward({"ids": case.inputs["ids"]})["logits"]
        dtypes = {t.dtype for kind in model.manifest.kinds.values() for t in kind.tensors}
    if version == "ATOMEP3":
        assert dtypes == {"f32"}
        assert np.isfinite(logits).all()
    else:
        assert dtypes == {"u8", "f32"}
        case.close("logits", logits, case.outputs["logits"])


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    case = family_case(LM)
    state = {name: torch.from_numpy(array) for name, array in case.weights.items()}
    state["embed.weight"] = torch.nn.Parameter(state["embed.weight"])
    config = {key: value for key, value in case.config.items() if key != "disable_pathways"}
    config |= {"family": "tilelli", "n_pathways": 3}
    path = tmp_path / "tiny.pt"
    torch.save({"config": config, "state_dict": state, "step": 7}, path)
    with em.load(package(path, tmp_path / "p")) as model:
        logits = model.forward({"ids": case.inputs["ids"]})["logits"]
    case.close("logits", logits, case.outputs["logits"])


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"config": {}, "state_dict": _Evil()}, "not a checkpoint of tensors"),
        ({"model": {}}, "expected a dictionary with `config`"),
        ([1], "expected a dictionary"),
        ({"config": {}, "state_dict": {"embed.weight": 3}}, "expected a tensor of floats"),
        ({"config": {}, "state_dict": {"w": torch.ones(2).to_sparse()}}, "found torch.sparse_coo"),
        ({"config": {}, "state_dict": {"w": torch.ones(2, device="meta")}}, "on 'meta'"),
        ({"config": {"family": "synapse"}, "state_dict": {}}, "family: expected 'tilelli'"),
        ({"config": {}, "state_dict": {}}, "does not match"),
    ],
)
def test_other_pickles_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_source(path)
    assert not Path("pwned").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"config": {"d_model": 8}, "state_dict": {"w": torch.ones(2)}}, path)
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    with pytest.raises(CheckpointError):
        read_source(path)
    # The lowest bit of the pickle's bytes, one after the other.
    for at in range(data.index(b"PK\x03\x04") + 30, data.index(b"PK\x03\x04", 4)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises((CheckpointError, ConfigError)):
            read_source(path)


def test_what_is_known_of_the_trained_checkpoint() -> None:
    """Its weights are not ours to hand out; its configuration and sizes are known."""
    raw = json.loads((FAMILY_CASES / "tilelli_checkpoint_944k.json").read_text())["expected"]
    config = lm_config(**raw["checkpoint_config"])
    assert FAMILIES["tilelli"].parameter_count(config) == raw["params"]
    assert atome.atome_bytes("ATOME01", config) == raw["atome01_blob_bytes"]
    assert len(FAMILIES["tilelli"].shapes(config)) == 84


@pytest.mark.skipif(CHECKPOINT not in os.environ, reason=f"{CHECKPOINT} names no atome_1m_v1.pt")
def test_the_trained_checkpoint(tmp_path: Path) -> None:
    case = family_case("tilelli_checkpoint_944k")
    path = Path(os.environ[CHECKPOINT])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == case.expected["checkpoint_sha256"]
    source = read_source(path)
    file = atome.quantise_atome("ATOME01", source.config, source.tensors)
    # alpha may differ from the reference's mean in its last bit, hence no digest.
    assert len(atome.write_atome(file, source.config)) == case.expected["atome01_blob_bytes"]
    with em.load(package(path, tmp_path / "p")) as model:
        for number, prompt in enumerate(case.expected["prompts"]):
            outputs = model.forward({"ids": case.inputs[f"{number}/ids"][0]})
            case.close("logits", outputs["logits"][-1], case.outputs[f"{number}/logits_last"])
            for layer in range(8):
                expected = case.outputs[f"{number}/router_weights"][layer]
                case.close("router", outputs[f"block{layer}/router"], expected)
            tokens = list(bytes.fromhex(prompt["bytes_hex"]))
            pieces = model.generate(tokens, max_new_tokens=prompt["n_new"])
            found = bytes([*tokens, *(piece.token for piece in pieces)])
            assert found.hex() == prompt["greedy_hex"]
