"""Checkpoint folders: read as they are, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from evermind_exporters.huggingface.checkpoint import Checkpoint, Rows
from evermind_manifests.errors import (
    CheckpointError,
    ExportError,
    LocationError,
    UnsupportedError,
)
from evermind_manifests.manifest import SCHEMA
from evermind_manifests.package import open_package
from safetensors.numpy import load_file, save_file

from evermind_pack.planning import open_subject

from .conftest import Imported


def folder_with(folder: Path, files: dict[str, dict[str, np.ndarray]], index: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    if index:
        listed = {tensor: name for name, tensors in files.items() for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


def test_rows_are_read_from_any_file_without_conversion(tmp_path: Path) -> None:
    stacked = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    half = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    files = {"a.safetensors": {"stacked": stacked}, "b.safetensors": {"half": half}}
    checkpoint = Checkpoint(folder_with(tmp_path, files))
    np.testing.assert_array_equal(checkpoint.read(Rows("stacked", 1, 2, 4)), stacked[1, 2:])
    np.testing.assert_array_equal(checkpoint.read(Rows("stacked", 0, 0, 2)), stacked[0, :2])
    assert checkpoint.dtype("half") == "bf16"
    np.testing.assert_array_equal(checkpoint.read(Rows("half", None, 0, 2)), half.view(np.uint16))


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"x": "gone.safetensors"}, "gone.safetensors: missing"),
        ({"x": "../a.safetensors"}, "weight_map"),
        ({"x": "a.bin"}, "weight_map"),
        ({"y": "a.safetensors"}, "y: expected in a.safetensors, found nowhere"),
        ({}, "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    tmp_path: Path, listed: dict[str, str], message: str
) -> None:
    folder_with(tmp_path, {"a.safetensors": {"x": np.zeros(2, np.float32)}})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    x = np.zeros(2, np.float32)
    files = {"a.safetensors": {"x": x, "y": x}, "b.safetensors": {"x": x}}
    folder = folder_with(tmp_path, files)
    with pytest.raises(CheckpointError, match="x: "):
        Checkpoint(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found neither"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header, but long enough")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({"adapter_config.json": "{}"}, "merge_and_unload"),
        ({"model.gguf": "GGUF"}, "GGUF files are not read"),
        ({"snapshots/abc/config.json": "{}"}, "snapshots/abc meant"),
        ({"manifest.json": f'{{"schema":"{SCHEMA}"}}'}, "a package already"),
        ({"manifest.json": "{}", "inner/config.json": "{}"}, "inner meant"),
        ({"model_index.json": "{}"}, "a pipeline of several models"),
        ({}, "as `save_pretrained` writes it"),
        (
            {"config.json": "{}", "adapter_config.json": "{}", "adapter_model.safetensors": ""},
            "merge_and_unload",
        ),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "Pickled .bin files"),
        ({"config.json": "{}", "a.safetensors": "", "b.safetensors": ""}, "the index"),
        ({"config.json": "{}", "a.safetensors": ""}, "call it model.safetensors"),
        ({"config.json": "{}"}, "Its weights are missing"),
        (
            {
                "config.json": "{}",
                "model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            },
            "git lfs pull",
        ),
    ],
)
def test_the_way_out_is_said_for_what_is_no_checkpoint(
    tmp_path: Path, files: dict[str, str], hint: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(tmp_path)
    assert hint in (raised.value.hint or "")
    if not {"config.json", "manifest.json"} & files.keys():
        with (
            pytest.raises(LocationError, match="found neither") as told,
            open_subject(str(tmp_path)),
        ):
            pass
        assert told.value.hint == raised.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": -32}, "negative dimension"),
        ({"hidden_size": "big"}, r"Validation error for field 'hidden_size': .*got str"),
        ({"hidden_act": "zorb"}, "KeyError: 'zorb'"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected at most 4,096"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings: expected at most"),
        (
            {"model_type": "zorb", "auto_map": {"AutoConfig": "configuration_zorb.Zorb"}},
            "code of its own",
        ),
        ({"model_type": [], "auto_map": {"AutoConfig": "a.B"}}, "code of its own"),
        ({"model_type": "zorb"}, "does not recognize this architecture"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    imported: Callable[[str], Imported], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    from evermind_exporters.huggingface.import_ import import_checkpoint

    source = imported("olmoe").checkpoint
    config = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_zorb.py").write_text("raise AssertionError('was run')")
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(UnsupportedError, match=message):
        import_checkpoint(tmp_path, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_damaged_texts_are_refused_before_the_long_part(
    imported: Callable[[str], Imported], tmp_path: Path
) -> None:
    from evermind_exporters.huggingface.import_ import import_checkpoint

    source = imported("olmoe").checkpoint
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(source / name)
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    stages: list[str] = []
    with pytest.raises(CheckpointError, match="temperature"):
        import_checkpoint(tmp_path, tmp_path / "package", stage=stages.append)
    assert stages == ["reading the checkpoint"]


def test_a_weight_that_does_not_fit_is_named(tmp_path: Path) -> None:
    from evermind_exporters.huggingface.reference import stored

    stacked = np.ones((2, 4, 3), np.float32)
    stacked[1, 2, 0] = 1e6
    checkpoint = Checkpoint(folder_with(tmp_path, {"a.safetensors": {"w": stacked}}))
    assert stored(checkpoint, Rows("w", 0, 0, 4), "f16").shape == (4, 3)
    with pytest.raises(ExportError, match=r"w, expert 1: 1 of 12 finite values do not fit f16"):
        stored(checkpoint, Rows("w", 1, 0, 4), "f16")


def test_expert_weights_are_kept_bit_by_bit(imported: Callable[[str], Imported]) -> None:
    made = imported("mixtral")
    tensors = {}
    for file in made.checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    assert len(list(made.checkpoint.glob("*.safetensors"))) > 1
    names = {"w_gate": "w1", "w_up": "w3", "w_down": "w2"}
    with open_package(made.package) as package:
        for shard in package.manifest.shards:
            contents = package.read_shard(shard.layer, shard.expert)
            for ours, theirs in names.items():
                name = (
                    f"model.layers.{shard.layer}.block_sparse_moe.experts.{shard.expert}."
                    f"{theirs}.weight"
                )
                expected = tensors[name]
                assert expected.dtype == ml_dtypes.bfloat16
                assert bytes(contents.views[ours]) == expected.tobytes()


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from evermind_exporters.huggingface.import_ import import_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(UnsupportedError, match="expected layers with experts"):
        import_checkpoint(tmp_path / "llama", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_cache_of_a_models_own_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from evermind_exporters.huggingface.import_ import import_checkpoint

    from .tiny import ARCHITECTURES, make

    layers = ["linear_attention", "full_attention"]
    form = {**ARCHITECTURES["mixtral"], "head_dim": 8, "layer_types": layers}
    make(tmp_path / "minimax", "minimax", form=form)
    with pytest.raises(UnsupportedError, match="uses cache of its own"):
        import_checkpoint(tmp_path / "minimax", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_an_incomplete_checkpoint_is_refused(
    imported: Callable[[str], Imported], tmp_path: Path
) -> None:
    from evermind_exporters.huggingface.import_ import import_checkpoint

    source = imported("olmoe").checkpoint
    whole = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    gone = "model.layers.1.mlp.experts.7.up_proj.weight"
    for name, message in ((gone, "expected the tensors of 8"), ("lm_head.weight", "lm_head")):
        rest = {key: value for key, value in whole.items() if key != name}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(tmp_path, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_weights_that_are_not_finite_are_refused(
    imported: Callable[[str], Imported], tmp_path: Path
) -> None:
    """A comparison of NaN with NaN would find no difference."""
    from evermind_exporters.huggingface.import_ import import_checkpoint

    source = imported("olmoe").checkpoint
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected finite logits .*: model\.norm\.weight"):
        import_checkpoint(tmp_path, tmp_path / "package")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_package_that_computes_something_else_is_not_written(
    imported: Callable[[str], Imported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up exchanged on the way into the shards: the check must see it."""
    from evermind_exporters.huggingface import import_

    source = imported("olmoe").checkpoint
    read = import_._ExpertArrays.__getitem__
    exchanged = {"w_gate": "w_up", "w_up": "w_gate", "w_down": "w_down"}
    monkeypatch.setattr(
        import_._ExpertArrays, "__getitem__", lambda self, name: read(self, exchanged[name])
    )
    with pytest.raises(ExportError, match="does not compute what transformers does"):
        import_.import_checkpoint(source, tmp_path / "package")
    assert list(tmp_path.iterdir()) == []
