"""The trunk of an imported checkpoint: its bits in the package, and the way they are read."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from evermind_manifests.dtypes import ITEMSIZE, STORAGE
from evermind_manifests.errors import CheckpointError, ConfigError, ExportError
from evermind_manifests.manifest import DType
from evermind_manifests.package import Package, open_package
from evermind_manifests.safetensors_header import read_header
from evermind_manifests.source_map import SourceTensor, parse_source
from evermind_manifests.validate import validate
from safetensors.numpy import load_file, save_file

from .conftest import Imported

# A vocabulary that makes large matrices, and has no divisors: blocks, and rows that are left.
VOCABULARY = 16411
TIED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "tie_word_embeddings": True,
}


def bits(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def tensors_of(checkpoint: Path) -> dict[str, npt.NDArray[Any]]:
    found: dict[str, npt.NDArray[Any]] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(file)
    return found


class Held:
    """What the safetensors files and the shards of a package hold, by the source map's names."""

    def __init__(self, package: Package) -> None:
        self.package = package
        assert package.manifest.resident is not None
        self.resident = self._file(package.manifest.resident)
        assert package.manifest.source is not None
        self.map = parse_source(package.read_file(package.manifest.source))
        self.kept = self._file(self.map.kept) if self.map.kept else {}
        kinds = {one.layer: package.manifest.kinds[one.kind] for one in package.manifest.layers}
        self.shards = {}
        for shard in package.manifest.shards:
            data = package.read_file(shard.file)[shard.offset : shard.offset + shard.bytes]
            for spec in kinds[shard.layer].tensors:
                part = data[spec.offset : spec.offset + spec.bytes]
                array = np.frombuffer(part, STORAGE[spec.dtype]).reshape(spec.shape)
                self.shards[shard.layer, shard.expert, spec.name] = array

    def _file(self, path: str) -> dict[str, tuple[DType, npt.NDArray[Any]]]:
        data = self.package.read_file(path)
        return {
            name: (
                one.dtype,
                np.frombuffer(data[one.begin : one.end], STORAGE[one.dtype]).reshape(one.shape),
            )
            for name, one in read_header(data).items()
        }

    def tensor(self, name: str, one: SourceTensor) -> npt.NDArray[Any]:
        if one.kept:
            return self.kept[name][1]
        if one.resident:
            assert {self.resident[part][0] for part in one.resident} == {one.dtype}
            parts = [self.resident[part][1] for part in one.resident]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        result = np.zeros(one.shape, STORAGE[one.dtype])
        for part in one.shards:
            array = self.shards[part.layer, part.expert, part.tensor]
            place = result[tuple(span.slice for span in part.at)]
            place[...] = (array.swapaxes(-1, -2) if part.transposed else array).reshape(place.shape)
        return result


def test_every_tensor_of_the_checkpoint_is_in_the_package_bit_by_bit(
    imported: Callable[[str], Imported], model_type: str
) -> None:
    made = imported(model_type)
    expected = tensors_of(made.checkpoint)
    with open_package(made.package) as package:
        held = Held(package)
        assert held.map.tensors.keys() == expected.keys()
        for name, one in held.map.tensors.items():
            assert one.resident or one.shards or one.kept, name
            assert one.shape == expected[name].shape
            np.testing.assert_array_equal(bits(held.tensor(name, one)), bits(expected[name]))
    names = {one.name for one in made.checkpoint.glob("*.safetensors")}
    assert held.map.files.keys() == names
    index = made.checkpoint / "model.safetensors.index.json"
    assert held.map.index == (
        json.loads(index.read_bytes())["metadata"] if index.exists() else None
    )


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """Half precision, tied embeddings, a tensor that no model has."""
    pytest.importorskip("transformers")
    from evermind_exporters.huggingface.import_ import import_checkpoint

    from .tiny import make

    folder = tmp_path_factory.mktemp("tied")
    model = make(folder / "checkpoint", "ernie4_5_moe", dtype="float16", form=TIED)
    file = folder / "checkpoint" / "model.safetensors"
    extra = np.arange(3, dtype=np.float16)
    save_file({**load_file(file), "model.unused": extra}, file, metadata={"format": "pt"})
    import_checkpoint(folder / "checkpoint", folder / "package")
    return Imported(model, folder / "checkpoint", folder / "package", None)


def test_tied_embeddings_are_stored_once_and_what_is_unused_is_kept(tied: Imported) -> None:
    expected = tensors_of(tied.checkpoint)
    assert "lm_head.weight" not in expected
    with open_package(tied.package) as package:
        held = Held(package)
        assert held.map.kept == "source.safetensors"
        assert held.kept.keys() == {"model.unused"}
        for name, one in held.map.tensors.items():
            np.testing.assert_array_equal(bits(held.tensor(name, one)), bits(expected[name]))
        shapes = [array.shape for _, array in held.resident.values()]
        assert shapes.count((VOCABULARY, 32)) == 1
        assert {dtype for dtype, _ in held.resident.values()} <= {"f16", "i64"}
    assert not validate(tied.package, deep=True).problems


def test_half_precision_in_blocks_computes_what_transformers_does(tied: Imported) -> None:
    import torch

    tokens = np.random.default_rng(2).integers(0, VOCABULARY, 40)
    with torch.no_grad():
        expected = tied.model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    with evermind_runtime.load(tied.package, budget="50%", plan="paged") as model:
        prefilled = model.forward({"tokens": tokens})["logits"]
        decoded = model.forward({"tokens": tokens}, steps="decode")["logits"]
    with evermind_runtime.load(tied.package, plan="paged") as model:
        np.testing.assert_array_equal(model.forward({"tokens": tokens})["logits"], prefilled)
    scale = np.abs(expected).max()
    assert np.abs(prefilled - expected).max() <= 5e-5 * scale
    assert np.abs(decoded - expected).max() <= 5e-5 * scale


class Checked:
    """A checkpoint of one large matrix, as `Trunk` asks for it."""

    def __init__(self, folder: Path, **tensors: npt.NDArray[Any]) -> None:
        from evermind_exporters.huggingface.checkpoint import Checkpoint
        from transformers import AutoConfig, AutoModelForCausalLM

        from .tiny import ARCHITECTURES, COMMON

        config = AutoConfig.for_model("olmoe", **{**COMMON, **ARCHITECTURES["olmoe"]})
        config.vocab_size = VOCABULARY
        import torch

        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config)
        rng = np.random.default_rng(0)
        arrays = {
            name: rng.normal(size=tuple(one.shape)).astype(np.float32)
            for name, one in self.model.state_dict().items()
            if "experts" not in name
        }
        save_file({**arrays, **tensors}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        self.checkpoint = Checkpoint(folder)

    def trunk(self, dtype: DType | None = None) -> Any:
        from evermind_exporters.huggingface.experts import find_experts
        from evermind_exporters.huggingface.trunk import Trunk

        return Trunk(self.model, find_experts(self.model), self.checkpoint, dtype)


HEAD, NORM = "lm_head.weight", "model.norm.weight"


@pytest.fixture
def checked(tmp_path: Path) -> Callable[..., Checked]:
    pytest.importorskip("transformers")
    return lambda **tensors: Checked(tmp_path, **tensors)


@pytest.mark.parametrize("dtype", [None, "f16", "bf16", "f32"])
def test_large_matrices_are_rounded_and_small_weights_are_kept(
    checked: Callable[..., Checked], dtype: DType | None
) -> None:
    source = checked()
    trunk = source.trunk(dtype)
    stored = trunk.weights
    assert stored[HEAD].dtype == (dtype or "f32")
    assert stored[NORM].dtype == "f32"
    values = np.concatenate(list(trunk.read(HEAD)))
    assert values.dtype.itemsize == ITEMSIZE[stored[HEAD].dtype]
    exact = source.checkpoint.values(HEAD, 0, VOCABULARY * 32)
    rounded = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}.get(dtype or "", np.float32)
    np.testing.assert_array_equal(bits(values), bits(exact.astype(rounded)))
    np.testing.assert_array_equal(
        trunk.values(HEAD).reshape(-1), exact.astype(rounded).astype(np.float32)
    )


def test_half_precision_widens_to_f32_without_loss(checked: Callable[..., Checked]) -> None:
    half = np.arange(32, dtype=np.float16) / 7
    trunk = checked(**{NORM: half}).trunk("f32")
    assert trunk.weights[NORM].dtype == "f32"
    np.testing.assert_array_equal(trunk.values(NORM), half.astype(np.float32))


def test_a_weight_that_would_become_infinite_is_refused(checked: Callable[..., Checked]) -> None:
    large = np.ones((VOCABULARY, 32), np.float32)
    large[-1, -1] = 1e6
    trunk = checked(**{HEAD: large}).trunk("f16")
    with pytest.raises(ExportError, match=r"lm_head\.weight: 1 of .* do not fit f16"):
        for _ in trunk.read(HEAD):
            pass


def test_a_weight_of_another_shape_is_refused(checked: Callable[..., Checked]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: shape: expected \(32,\)"):
        checked(**{NORM: np.ones(31, np.float32)}).trunk()


def test_tied_weights_that_differ_are_two(checked: Callable[..., Checked]) -> None:
    source = checked()
    source.model.config.tie_word_embeddings = True
    source.model.all_tied_weights_keys = {HEAD: "model.embed_tokens.weight"}
    assert source.trunk().name(HEAD) == HEAD
    table = source.checkpoint.values(HEAD, 0, VOCABULARY * 32).reshape(-1, 32).copy()
    again = checked(**{"model.embed_tokens.weight": table, HEAD: table})
    again.model.all_tied_weights_keys = {HEAD: "model.embed_tokens.weight"}
    trunk = again.trunk()
    assert trunk.name(HEAD) == "model.embed_tokens.weight"
    assert HEAD not in trunk.weights
    assert trunk.places()[HEAD] == ("model.embed_tokens.weight",)


def test_packing_holds_a_block_at_a_time(checked: Callable[..., Checked]) -> None:
    from evermind_exporters.huggingface.trunk import LARGE
    from evermind_exporters.resident import TensorFile

    trunk = checked(**{HEAD: np.ones((VOCABULARY, 32), np.float32)}).trunk("f16")
    file = TensorFile(trunk.weights)
    tracemalloc.start()
    try:
        written = sum(
            memoryview(part).nbytes
            for part in file.parts(
                lambda name: (block.view(np.uint8).data for block in trunk.read(name))
            )
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written == file.size
    assert peak < 4 * LARGE * 4


def test_a_model_larger_than_memory_is_laid_out(checked: Callable[..., Checked]) -> None:
    """64 GiB of weights: addresses, but no pages."""
    import torch
    from evermind_exporters.huggingface.skeleton import _untouched

    like = torch.empty((1 << 16, 1 << 14), device="meta")
    tensors = [_untouched(like) for _ in range(16)]
    assert sum(one.numel() for one in tensors) * 4 == 64 << 30
    assert float(tensors[7][-1, -1]) == 0


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    from evermind_exporters.huggingface.import_ import ImportOptions, import_checkpoint

    options = ImportOptions(trunk="f8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="trunk: expected one of keep, f16, bf16, f32"):
        import_checkpoint(tmp_path, tmp_path / "package", options)
