"""Packages: written, opened, read; the same content gives the same bytes."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
from evermind_manifests import open_package
from evermind_manifests.errors import (
    DigestError,
    InputError,
    IntegrityError,
    ManifestError,
    MissingFileError,
    ShardDigestError,
)
from evermind_manifests.manifest import (
    FileEntry,
    Layer,
    Manifest,
    Shard,
    Step,
    encode_manifest,
    parse_manifest,
)
from evermind_manifests.store import DirectoryStore
from evermind_manifests.structure import check_structure
from evermind_manifests.zip_store import ZipStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.manifests.builders import (
    EXPERTS,
    LAYERS,
    edit_manifest,
    tiny_arrays,
    tiny_graphs,
    tiny_manifest,
    tiny_shard,
    write_tiny,
)

FORMS = [("package", "files"), ("package", "pool"), ("package.zip", "files"), ("p.zip", "pool")]


@pytest.mark.parametrize(("name", "layout"), FORMS)
def test_round_trip(tmp_path: Path, name: str, layout: Literal["files", "pool"]) -> None:
    digest = write_tiny(tmp_path / name, layout=layout)
    with open_package(tmp_path / name) as package:
        assert package.digest == digest
        assert package.manifest.name == "tiny"
        for path, data in tiny_graphs().items():
            assert package.read_file(path) == data
        assert sorted(package.manifest.files) == [
            path for path in package.store.paths() if path != "manifest.json"
        ]
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                contents = package.read_shard(layer, expert)
                for tensor, array in tiny_arrays(layer, expert).items():
                    np.testing.assert_array_equal(contents.array(tensor), array.astype(np.float32))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_digest_is_that_of_the_manifest(tmp_path: Path) -> None:
    digest = write_tiny(tmp_path / "a")
    data = (tmp_path / "a" / "manifest.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert encode_manifest(parse_manifest(data)) == data


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, layout in FORMS:
        one, other = (tmp_path / side / layout / name for side in ("one", "other"))
        assert write_tiny(one, layout=layout) == write_tiny(other, layout=layout)
        if one.is_file():
            assert one.read_bytes() == other.read_bytes()
    # A folder and a single file of the same content are the same package.
    assert write_tiny(tmp_path / "a") == write_tiny(tmp_path / "a.zip")


def test_other_content_gives_another_digest(tmp_path: Path) -> None:
    one = write_tiny(tmp_path / "one")
    other = write_tiny(
        tmp_path / "other", shard=lambda layer, expert: tiny_shard(layer, expert)[:-64] + bytes(64)
    )
    assert one != other


def test_pools_are_aligned(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a", layout="pool")
    with open_package(tmp_path / "a") as package:
        assert {shard.file for shard in package.manifest.shards} == {"experts/pool-000.moe0p"}
        assert [shard.offset for shard in package.manifest.shards] == [
            4096 * number for number in range(LAYERS * EXPERTS)
        ]


def test_a_full_pool_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_manifests.writer.POOL_BYTES", 8192)
    write_tiny(tmp_path / "a", layout="pool")
    with open_package(tmp_path / "a") as package:
        files = [shard.file for shard in package.manifest.shards]
        assert files == [f"experts/pool-{number // 2:03d}.moe0p" for number in range(6)]
        assert package.read_shard(1, 2).header.expert == 2


def test_the_zip_is_a_zip_for_others_too(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        members = archive.infolist()
        assert members[0].filename == "manifest.json"
        assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}
        assert {member.date_time for member in members} == {(1980, 1, 1, 0, 0, 0)}
        archive.extractall(tmp_path / "unpacked")
    with ZipStore(tmp_path / "a.zip") as store:
        assert all(store.open_extent(path)[1] % 4096 == 0 for path in store.paths())
    with open_package(tmp_path / "unpacked") as unpacked, open_package(tmp_path / "a.zip") as one:
        assert unpacked.digest == one.digest


def test_large_zips_have_zip64_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limits lowered, every number takes its 64-bit form."""
    for module in ("zip_writer", "zip_store"):
        monkeypatch.setattr(f"evermind_manifests.{module}.FULL16", 3)
        monkeypatch.setattr(f"evermind_manifests.{module}.FULL32", 300)
    digest = write_tiny(tmp_path / "large.zip")
    data = (tmp_path / "large.zip").read_bytes()
    assert data.count(b"PK\x06\x06") == data.count(b"PK\x06\x07") == 1
    with open_package(tmp_path / "large.zip") as package:
        assert package.digest == digest
        for path, content in tiny_graphs().items():
            assert package.read_file(path) == content
        assert package.read_shard(1, 2).header.expert == 2


def test_a_store_can_be_opened(tmp_path: Path) -> None:
    digest = write_tiny(tmp_path / "a")
    with open_package(DirectoryStore(tmp_path / "a")) as package:
        assert package.digest == digest
        assert package.location == str(tmp_path / "a")


def test_what_is_not_in_the_package(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    with open_package(tmp_path / "a") as package:
        with pytest.raises(InputError, match="no expert 3 in layer 0"):
            package.shard(0, 3)
        with pytest.raises(InputError, match="there is no MoE layer 2"):
            package.kind_of(2)
        with pytest.raises(InputError, match=r"'manifest.json' is not a file of this package"):
            package.read_file("manifest.json")


def test_changed_files_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    with open_package(tmp_path / "a") as package:
        graph = tmp_path / "a" / "graphs" / "head.onnx"
        data = bytearray(graph.read_bytes())
        data[-1] ^= 1
        graph.write_bytes(data)
        with pytest.raises(DigestError) as caught:
            package.read_file("graphs/head.onnx")
        lines = str(caught.value).splitlines()
        assert lines[0] == "graphs/head.onnx: sha256 mismatch"
        expected = package.manifest.files["graphs/head.onnx"].sha256
        assert lines[1] == f"  expected {expected} (manifest.json, files['graphs/head.onnx'])"
        assert lines[2] == f"  found    {hashlib.sha256(data).hexdigest()}"
        assert "evermind-pack validate" in str(caught.value)
        assert caught.value.exit_code == 3

        graph.write_bytes(data + b"x")
        with pytest.raises(IntegrityError, match=r"expected .* bytes .*, found"):
            package.read_file("graphs/head.onnx")
        graph.unlink()
        # The descriptor may still be cached; a fresh store sees that it is gone.
        with open_package(tmp_path / "a") as again, pytest.raises(MissingFileError):
            again.read_file("graphs/head.onnx")


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a", layout="pool")
    pool = tmp_path / "a" / "experts" / "pool-000.moe0p"
    data = bytearray(pool.read_bytes())
    data[4096 * 4 + 300] ^= 4
    pool.write_bytes(data)
    with open_package(tmp_path / "a") as package:
        package.read_shard(0, 0)
        with pytest.raises(ShardDigestError, match=r"pool-000.moe0p@16384: sha256 mismatch"):
            package.read_shard(1, 1)


def test_opening_lists_the_first_problems(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    edit_manifest(tmp_path / "a", lambda raw: raw.update(layers=[], shards=raw["shards"][:6]))
    with pytest.raises(ManifestError) as caught:
        open_package(tmp_path / "a")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("a: manifest.json: 10 problems")
    assert "there is no expert 0 in layer 0 [shard-surplus]" in lines[1]
    assert "… and 5 more" in lines[6]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("layout", ["files", "pool"])
def test_twenty_thousand_shards(tmp_path: Path, layout: str) -> None:
    """Opening reads the manifest alone: 250 ms on one core, 100 ms with pools.

    Of these, 85 ms and 35 ms check its structure.
    """
    layers, experts = 20, 1000
    base = tiny_manifest()
    size = base.kinds["ffn"].bytes
    shards = []
    files = {
        path: FileEntry(bytes=1, sha256="0" * 64)
        for path in (*tiny_graphs(), "graphs/resident.safetensors", "parity.json")
    }
    for number in range(layers * experts):
        layer, expert = divmod(number, experts)
        file, offset = f"experts/l{layer:03d}/e{expert:04d}.moe0", 0
        if layout == "pool":
            file, offset = f"experts/pool-{layer:03d}.moe0p", 4096 * expert
        digest = f"{number:064x}"
        files[file] = FileEntry(bytes=offset + size, sha256=digest)
        shards.append(
            Shard(layer=layer, expert=expert, file=file, offset=offset, bytes=size, sha256=digest)
        )
    route, step, head = base.plan.prefill[0], base.plan.prefill[1], base.plan.prefill[4]
    steps: list[Step] = []
    x = "x"
    for layer in range(layers):
        ids, gates, y = f"ids.{layer}", f"gates.{layer}", f"h.{layer}"
        outputs = {"ids": ids, "gates": gates}
        steps.append(msgspec.structs.replace(route, inputs={"x": x}, outputs=outputs))
        steps.append(msgspec.structs.replace(step, layer=layer, x=x, ids=ids, gates=gates, y=y))
        x = y
    steps.append(msgspec.structs.replace(head, inputs={"h": x, "state": "state"}))
    manifest = msgspec.structs.replace(
        base,
        files=files,
        layers=tuple(
            Layer(layer=layer, kind="ffn", experts=experts, top_k=2) for layer in range(layers)
        ),
        shards=tuple(shards),
        plan=msgspec.structs.replace(base.plan, prefill=tuple(steps), decode=tuple(steps)),
    )
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    with open_package(tmp_path) as package:
        assert check_structure(package.manifest) == []
        assert package.shard(19, 999).sha256 == f"{19_999:064x}"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(min_size=1, max_size=40),
    description=st.text(max_size=200),
    tags=st.lists(st.text(max_size=10), max_size=3),
)
def test_any_words_survive(tmp_path: Path, name: str, description: str, tags: list[str]) -> None:
    """Whatever a user calls a model, the package can be written, read and written again."""
    base = tiny_manifest()
    assert base.card is not None
    card = msgspec.structs.replace(base.card, description=description, tags=tuple(tags))
    manifest: Manifest = msgspec.structs.replace(base, name=name, card=card)
    digest = write_tiny(tmp_path / "a", manifest=manifest, overwrite=True)
    with open_package(tmp_path / "a") as package:
        assert package.manifest.name == name
        assert package.manifest.card == card
        assert package.digest == digest
