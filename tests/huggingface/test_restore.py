"""The way back from a package to the checkpoint it was imported from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from evermind_exporters.huggingface.documents import made_files, read_documents
from evermind_exporters.huggingface.restore import restore_checkpoint
from evermind_manifests import PackageWriter, open_package
from evermind_manifests.errors import (
    ConfigError,
    DigestError,
    EvermindPackError,
    ExportError,
    ManifestError,
    ShardDigestError,
)
from evermind_manifests.source_map import (
    KEPT_NAME,
    SOURCE_FORMAT,
    SOURCE_NAME,
    ShardPart,
    SourceFile,
    SourceMap,
    SourceTensor,
    Span,
    encode_source,
)
from safetensors.numpy import load_file

from tests.cli.command_line import call
from tests.manifests.builders import (
    EXPERTS,
    LAYERS,
    tiny_arrays,
    tiny_graphs,
    tiny_manifest,
    tiny_resident,
    tiny_shard,
)

KEPT = {"frequencies": np.arange(5), "unused": np.arange(6.0).reshape(2, 3)}
RESIDENT = safetensors.numpy.load(tiny_resident())


def part(layer: int, expert: int, tensor: str, *at: tuple[int, ...], **more: Any) -> ShardPart:
    return ShardPart(
        layer=layer, expert=expert, tensor=tensor, at=tuple(Span(*one) for one in at), **more
    )


def tensors() -> dict[str, tuple[SourceTensor, npt.NDArray[Any]]]:
    """Name → what the map says, and what must come back: one of each form."""
    one, other = ([tiny_arrays(layer, e) for e in range(EXPERTS)] for layer in range(LAYERS))
    fused = [np.concatenate([array["w1"], array["w2"].T]) for array in other]
    woven = np.empty((2, 16, 4), np.float16)
    for row, expert in enumerate((1, 2)):
        woven[row, 0::2], woven[row, 1::2] = one[expert]["w1"], one[expert]["w2"].T
    experts = range(EXPERTS)
    return {
        "router": (
            SourceTensor(dtype="f32", shape=(6, 4), resident=("router.0", "router.1")),
            np.concatenate([RESIDENT["router.0"], RESIDENT["router.1"]]),
        ),
        "scale": (
            SourceTensor(dtype="bf16", shape=(4,), resident=("scale",)),
            RESIDENT["scale"].astype(ml_dtypes.bfloat16),
        ),
        "0.w1": (
            SourceTensor(dtype="f16", shape=(8, 4), shards=(part(0, 0, "w1"),)),
            one[0]["w1"],
        ),
        "fused": (
            SourceTensor(
                dtype="f16",
                shape=(3, 16, 4),
                shards=(
                    *(part(1, e, "w1", (e, e + 1), (0, 8)) for e in experts),
                    *(part(1, e, "w2", (e, e + 1), (8, 16), transposed=True) for e in experts),
                ),
            ),
            np.stack(fused),
        ),
        "woven": (
            SourceTensor(
                dtype="f16",
                shape=(2, 16, 4),
                shards=(
                    part(0, 2, "w2", (1, 2), (1, 16, 2), transposed=True),
                    part(0, 2, "w1", (1, 2), (0, 16, 2)),
                    part(0, 1, "w2", (0, 1), (1, 16, 2), transposed=True),
                    part(0, 1, "w1", (0, 1), (0, 16, 2)),
                ),
            ),
            woven,
        ),
        "flat": (
            SourceTensor(
                dtype="f32",
                shape=(24,),
                shards=tuple(part(1, e, "b1", (8 * e, 8 * e + 8)) for e in experts),
            ),
            np.concatenate([array["b1"] for array in other]),
        ),
        "every third": (
            SourceTensor(
                dtype="f32",
                shape=(24,),
                shards=tuple(part(1, e, "b1", (e, 24, 3)) for e in experts),
            ),
            np.stack([array["b1"] for array in other], axis=1).reshape(-1),
        ),
        "frequencies": (SourceTensor(dtype="i64", shape=(5,), kept=True), KEPT["frequencies"]),
        "unused": (SourceTensor(dtype="f64", shape=(2, 3), kept=True), KEPT["unused"]),
    }


def source_map(**more: SourceTensor) -> SourceMap:
    listed = {name: one for name, (one, _) in tensors().items()} | more
    names = list(listed)
    return SourceMap(
        format=SOURCE_FORMAT,
        files={
            "model-00001-of-00002.safetensors": SourceFile(
                tensors=tuple(names[:4]), metadata={"format": "pt"}
            ),
            "model-00002-of-00002.safetensors": SourceFile(tensors=tuple(names[4:])),
        },
        tensors=listed,
        kept=KEPT_NAME,
        index={"total_size": 1234},
    )


def package(
    folder: Path, source: SourceMap | None = None, files: Mapping[str, bytes] | None = None
) -> Path:
    with PackageWriter(folder) as writer:
        for path, data in {**tiny_graphs(), **(files or {})}.items():
            writer.add_file(path, data)
        writer.add_file("graphs/resident.safetensors", tiny_resident())
        writer.add_file("parity.json", b'{"cases": []}\n')
        writer.add_file(SOURCE_NAME, encode_source(source or source_map()))
        writer.add_file(KEPT_NAME, safetensors.numpy.save(KEPT))
        writer.add_file("source/generation_config.json", b'{"eos_token_id":   2}')
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                writer.add_shard(layer, expert, tiny_shard(layer, expert))
        manifest = msgspec.structs.replace(
            tiny_manifest(),
            family="huggingface/tiny",
            config={"model_type": "tiny", "name": "é"},
            source=SOURCE_NAME,
        )
        writer.finish(manifest)
    return folder


def restore(location: Path, destination: Path, **options: Any) -> Any:
    with open_package(location) as opened:
        return restore_checkpoint(opened, destination, **options)


def same(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (
        expected.dtype,
        expected.shape,
        np.ascontiguousarray(expected).tobytes(),
    )


def test_every_form_comes_back_bit_by_bit(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = tmp_path / "out"
    done = restore(package(tmp_path / "p"), out, progress=lambda *now: told.append(now))
    assert (done.tensors, done.rounded) == (9, ())
    found: dict[str, npt.NDArray[Any]] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() == tensors().keys()
    for name, (_, expected) in tensors().items():
        assert same(found[name], expected), name
    total = sum(array.nbytes for array in found.values())
    assert told[-1] == (total, total)
    assert json.loads((out / "config.json").read_text()) == {"model_type": "tiny", "name": "é"}
    assert (out / "generation_config.json").read_bytes() == b'{"eos_token_id":   2}'
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 1234}
    assert index["weight_map"]["router"] == "model-00001-of-00002.safetensors"
    assert index["weight_map"].keys() == found.keys()
    assert {path.name for path in out.iterdir()} == done.files.keys()
    with safetensors.safe_open(out / "model-00001-of-00002.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("original", [b'{"own":   1}', b'{"the package\'s": 1}', None])
def test_the_tokenizer_that_comes_back_is_the_checkpoint_s(
    tmp_path: Path, original: bytes | None
) -> None:
    """Rewritten for the package, as it is, or made of a vocabulary where there was no file."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    if original is not None:
        (checkpoint / "tokenizer.json").write_bytes(original)
    held = {"tokenizer.json": b'{"the package\'s": 1}'}
    files = held | read_documents(checkpoint, held)
    assert len(files) == (2 if original not in (None, *held.values()) else 1)
    source = msgspec.structs.replace(source_map(), made=made_files(checkpoint, held))
    restore(package(tmp_path / "p", source, files), tmp_path / "out")
    found = tmp_path / "out" / "tokenizer.json"
    assert (found.read_bytes() if found.exists() else None) == original


def test_of_two_files_the_original_comes_back_whatever_the_map_says(tmp_path: Path) -> None:
    files = {"tokenizer.json": b"{}", "source/tokenizer.json": b"{ }"}
    restore(package(tmp_path / "p", files=files), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{ }"


COARSE = SourceTensor(dtype="f32", shape=(8, 4), shards=(part(0, 1, "w1"),))


def test_what_was_rounded_is_refused_unless_told(tmp_path: Path, capsys: Any) -> None:
    location = package(tmp_path / "p", source_map(coarse=COARSE))
    with pytest.raises(ConfigError, match="1 of 10 tensors were rounded by the import, coarse amo"):
        restore(location, tmp_path / "out")
    command = ("convert", location, "-o", tmp_path / "out", "--to", "hf", "--json")
    code, out, _ = call(capsys, *command)
    assert (code, "--lossy" in json.loads(out)["error"]["hint"]) == (2, True)
    assert not (tmp_path / "out").exists()
    code, out, _ = call(capsys, *command, "--lossy")
    result = json.loads(out)
    assert (code, result["lossless"], result["rounded"]) == (0, False, ["coarse"])
    found = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    assert same(found["coarse"], tiny_arrays(0, 1)["w1"])


def test_what_was_quantised_has_no_way_back(tmp_path: Path) -> None:
    location = package(tmp_path / "p", source_map(codes=SourceTensor(dtype="u8", shape=(7,))))
    for lossy in (False, True):
        with pytest.raises(ConfigError, match=r"1 of 10 tensors .* not in the package, codes"):
            restore(location, tmp_path / "out", lossy=lossy)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("graphs/resident.safetensors", DigestError),
        ("source.safetensors", DigestError),
        ("source.json", DigestError),
        ("experts/l001/e0002.moe0", ShardDigestError),
    ],
)
def test_damage_is_found_and_nothing_is_left(
    tmp_path: Path, file: str, error: type[EvermindPackError]
) -> None:
    flip(package(tmp_path / "p") / file)
    with pytest.raises(error):
        restore(tmp_path / "p", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def renamed(name: str) -> Callable[[SourceMap], SourceMap]:
    def change(source: SourceMap) -> SourceMap:
        files = dict(zip([name, "b.safetensors"], source.files.values(), strict=True))
        return msgspec.structs.replace(source, files=files)

    return change


def widened(source: SourceMap) -> SourceMap:
    """The router has values that bfloat16 does not hold."""
    router = msgspec.structs.replace(source.tensors["router"], dtype="bf16")
    return msgspec.structs.replace(source, tensors=source.tensors | {"router": router})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("../a.safetensors"), "ends in .safetensors"),
        (renamed("config.json"), "ends in .safetensors"),
        (renamed(".a.safetensors"), "ends in .safetensors"),
        (widened, "expected values that bf16 holds"),
        (lambda source: msgspec.structs.replace(source, kept=None), "kept: expected a file"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[SourceMap], SourceMap], message: str
) -> None:
    location = package(tmp_path / "p", change(source_map()))
    with pytest.raises(ManifestError, match=message):
        restore(location, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_package_without_a_way_back_is_refused(tmp_path: Path, capsys: Any) -> None:
    location = package(tmp_path / "p")
    raw = json.loads((location / "manifest.json").read_text())
    del raw["source"]
    (location / "manifest.json").write_text(json.dumps(raw))
    code, _, err = call(capsys, "convert", location, "-o", tmp_path / "out", "--to", "hf")
    assert (code, "the way back to it" in err) == (2, True)


def test_an_import_that_was_cut_off_there_stays(tmp_path: Path) -> None:
    location, out = package(tmp_path / "p"), tmp_path / "out"
    with suppress(KeyboardInterrupt), PackageWriter(out, resumable=True) as writer:
        writer.resume({})
        writer.add_shard(0, 0, tiny_shard(0, 0))
        raise KeyboardInterrupt
    with pytest.raises(ExportError, match="an unfinished import with 1 experts is there"):
        restore(location, out)
    with PackageWriter(out, resumable=True) as writer:
        assert writer.resume({}) == {(0, 0)}


def test_mistakes_of_usage(tmp_path: Path, capsys: Any) -> None:
    location = package(tmp_path / "p")
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        restore(location, tmp_path / "out")
    for more, message in (
        (["--to", "evl0"], "It fits: hf"),
        (["--to", "hf", "--fp16"], "have no meaning"),
        (["--to", "hf", "--force"], "--force has no meaning"),
    ):
        code, _, err = call(capsys, "convert", location, "-o", tmp_path / "new", *more)
        assert (code, message in err) == (2, True)
    assert not (tmp_path / "new").exists()
