"""Damaged packages at run time: a named error, nothing wrong ever reaches a graph."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime as em
import msgspec
import pytest
from evermind_manifests.errors import (
    DigestError,
    EvermindPackError,
    IntegrityError,
    ManifestError,
    MissingFileError,
    ShardDigestError,
    ShardError,
    TruncatedError,
)
from evermind_manifests.manifest import encode_manifest, parse_manifest

from tests.packages import export, random_source
from tests.runtime.paging import check_idle

TOKENS = {"tokens": list(range(60))}


@pytest.fixture
def package(lm_package: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(lm_package, tmp_path / "lm"))


def shard_path(package: Path, layer: int, expert: int) -> Path:
    manifest = parse_manifest((package / "manifest.json").read_bytes())
    found = next(s for s in manifest.shards if (s.layer, s.expert) == (layer, expert))
    return package / found.file


def truncate(package: Path) -> None:
    path = shard_path(package, 1, 2)
    os.truncate(path, path.stat().st_size - 64)


def flip(package: Path) -> None:
    path = shard_path(package, 1, 2)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def swap_files(package: Path) -> None:
    one, other = shard_path(package, 1, 2), shard_path(package, 1, 3)
    one_bytes = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(one_bytes)


def swap_entries(package: Path) -> None:
    """Every digest is right, but two experts have changed places in the manifest."""
    path = package / "manifest.json"
    manifest = parse_manifest(path.read_bytes())
    one = next(s for s in manifest.shards if (s.layer, s.expert) == (1, 2))
    other = next(s for s in manifest.shards if (s.layer, s.expert) == (1, 3))
    moved = {
        one: msgspec.structs.replace(other, expert=2),
        other: msgspec.structs.replace(one, expert=3),
    }
    shards = tuple(moved.get(shard, shard) for shard in manifest.shards)
    path.write_bytes(encode_manifest(msgspec.structs.replace(manifest, shards=shards)))


def remove(package: Path) -> None:
    shard_path(package, 1, 2).unlink()


def link(package: Path) -> None:
    path = shard_path(package, 1, 2)
    target = package.parent / "elsewhere.moe0"
    path.rename(target)
    path.symlink_to(target)


def pipe(package: Path) -> None:
    path = shard_path(package, 1, 2)
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, TruncatedError, "e0002"),
        (flip, ShardDigestError, "expected [0-9a-f]{64}(.|\n)*found"),
        (swap_files, ShardDigestError, "layer 1, expert [23]"),
        (
            swap_entries,
            ShardError,
            "expected layer 1 expert ([23]),? found layer 1 expert (?!\\1)[23]",
        ),
        (remove, MissingFileError, "e0002"),
        (link, IntegrityError, "e0002"),
        (pipe, IntegrityError, "e0002"),
    ],
)
@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a_damaged_shard_is_named_and_nothing_is_pinned(
    package: Path,
    damage: Callable[[Path], None],
    error: type[EvermindPackError],
    message: str,
    steps: Any,
) -> None:
    damage(package)
    with em.load(package, budget="50%") as model:
        state = model.new_state()
        before = state.save()
        with pytest.raises(error, match=message):
            model.forward(TOKENS, state=state, steps=steps)
        assert model._pager.slots.pinned == 0
        assert model.stats().resident_expert_bytes <= model.budget
        if steps == "prefill":
            assert all((before[name] == array).all() for name, array in state.save().items())


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("graphs/resident.safetensors", DigestError),
        ("graphs/decode_01.onnx", DigestError),
        ("manifest.json", ManifestError),
    ],
)
def test_any_other_damaged_file_is_named(
    package: Path, file: str, error: type[EvermindPackError]
) -> None:
    data = bytearray((package / file).read_bytes())
    data[len(data) // 2] ^= 0x80
    (package / file).write_bytes(data)
    with pytest.raises(error, match=file), em.load(package) as model:
        model.forward(TOKENS, steps="decode")


def test_a_read_that_went_wrong_once_is_tried_again(lm_package: Path) -> None:
    with em.load(lm_package, plan="half") as expected_model:
        expected = expected_model.forward(TOKENS)["logits"]
    with em.load(lm_package, plan="half") as model:
        store = model._package.store
        honest = store.read_into
        reads: dict[tuple[str, int], int] = {}

        def flaky(path: str, offset: int, buffer: memoryview) -> None:
            honest(path, offset, buffer)
            reads[path, offset] = reads.get((path, offset), 0) + 1
            if reads[path, offset] == 1:
                buffer[len(buffer) // 2] ^= 0xFF

        store.read_into = flaky  # type: ignore[method-assign]
        assert (model.forward(TOKENS)["logits"] == expected).all()
        assert set(reads.values()) == {2}
        assert model.stats().bytes_read == 2 * model.stats().resident_expert_bytes


def test_verification_can_be_left_out_or_repeated(package: Path) -> None:
    flip(package)
    with em.load(package, verify="never") as model:
        model.forward(TOKENS)
    with em.load(package, budget="25%", verify="always") as model, pytest.raises(ShardDigestError):
        model.forward(TOKENS)


@pytest.mark.parametrize("width", [32, 256])
def test_what_lies_behind_a_short_member_of_a_zip_is_no_expert(tmp_path: Path, width: int) -> None:
    """Small experts and large ones, with nothing to verify them."""
    config = {
        "vocabSize": 60,
        "dModel": width,
        "numLayers": 2,
        "hiddenDim": 2 * width,
        "numExperts": 4,
        "topK": 2,
    }
    path = export(random_source("evermind-lm", config), tmp_path / "whole.zip")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "lm.zip", "w") as short:
        for name in whole.namelist():
            cut = 64 if name.endswith("l001/e0002.moe0") else 0
            short.writestr(name, whole.read(name)[: -cut or None])
    with em.load(tmp_path / "lm.zip", plan="paged", verify="never") as model:
        with pytest.raises(TruncatedError, match="l001/e0002"), model._pager.acquire(1, [1, 2]):
            pass
        check_idle(model)
        assert (1, 2) not in model._pager.slots.resident


def test_damage_after_the_first_read_is_seen_when_always_verifying(package: Path) -> None:
    for verify, refuses in (("first", False), ("always", True)):
        with em.load(package, budget="25%", verify=verify) as model:  # type: ignore[arg-type]
            model.forward(TOKENS)
            path = shard_path(package, 0, 0)
            whole = path.read_bytes()
            # In place: the store keeps files open, as a long-running reader does.
            with path.open("r+b") as file:
                file.seek(len(whole) - 100)
                file.write(bytes([whole[-100] ^ 1]))
            try:
                if refuses:
                    with pytest.raises(ShardDigestError):
                        model.forward(TOKENS)
                else:
                    model.forward(TOKENS)
            finally:
                with path.open("r+b") as file:
                    file.write(whole)
