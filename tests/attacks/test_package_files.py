"""Hostile folders: nothing outside the package is ever read, and nothing hangs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import onnx
import pytest
from evermind_manifests import open_package
from evermind_manifests.errors import (
    EvermindPackError,
    GraphError,
    IntegrityError,
    ManifestError,
    MissingFileError,
    TruncatedError,
)
from evermind_manifests.graph import check_graph, inspect_graph
from evermind_manifests.interface import external_locations
from evermind_manifests.manifest import parse_manifest
from evermind_manifests.store import DirectoryStore
from evermind_manifests.validate import validate

from tests.manifests.builders import (
    edit_manifest,
    external_tensor,
    replace_file,
    tiny_graphs,
    tiny_shard,
    write_tiny,
)

SHARD = "experts/l000/e0000.moe0"
SECRET = tiny_shard(0, 0)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "secret.moe0").write_bytes(SECRET)
    (tmp_path / "l000").mkdir()
    (tmp_path / "l000" / "e0000.moe0").write_bytes(SECRET)
    write_tiny(tmp_path / "p")
    return tmp_path / "p"


def link_to_file(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parents[3] / "secret.moe0")


def link_inside(path: Path) -> None:
    path.rename(path.with_name("real.moe0"))
    path.symlink_to("real.moe0")


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def link_to_folder(path: Path) -> None:
    folder = path.parent
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.parents[2] / "l000")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    path.unlink()
    # The address is relative: its length is limited.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "attack",
    [link_to_file, link_inside, dangling_link, loop, link_to_folder, fifo, folder, unix_socket],
)
def test_what_is_no_regular_file(package: Path, attack: Callable[[Path], None]) -> None:
    """The content behind a link is the right one, digest and all; still it is not read."""
    attack(package / SHARD)
    with open_package(package) as opened:
        for read in (
            lambda: opened.read_shard(0, 0),
            lambda: opened.read_file(SHARD),
            lambda: opened.store.size(SHARD),
            lambda: opened.store.read(SHARD, limit=1 << 20),
        ):
            with pytest.raises(MissingFileError) as caught:
                read()
            assert SHARD in str(caught.value)
    report = validate(package, deep=True)
    assert report.exit_code == 3
    assert ("missing-file", SHARD) in {(item.code, item.place) for item in report.errors}


def test_a_folder_swapped_for_a_link_after_opening(package: Path) -> None:
    """Paths are resolved at each opening, relative to descriptors: a swap leads nowhere."""
    with open_package(package) as opened:
        opened.store.size("experts/l000/e0001.moe0")
        link_to_folder(package / SHARD)
        with pytest.raises(MissingFileError):
            opened.store.read(SHARD, limit=1 << 20)


def test_the_whole_package_swapped_after_opening(package: Path, tmp_path: Path) -> None:
    with open_package(package) as opened:
        package.rename(tmp_path / "elsewhere")
        write_tiny(package, shard=lambda layer, expert: tiny_shard(layer, expert)[:-64] + bytes(64))
        assert opened.read_shard(0, 0).header.expert == 0


def test_a_manifest_that_is_a_link(package: Path) -> None:
    manifest = package / "manifest.json"
    manifest.rename(package.parent / "manifest.json")
    manifest.symlink_to(package.parent / "manifest.json")
    for message in ("symlink", "regular file", "No such file"):
        with pytest.raises(ManifestError, match=rf"p: not a package: manifest\.json: .*{message}"):
            open_package(package)
        report = validate(package)
        assert [item.code for item in report.errors] == ["not-a-package"]
        assert message in report.errors[0].message
        assert report.exit_code == 1
        manifest.unlink(missing_ok=True)
        if message == "symlink":
            os.mkfifo(manifest)


def test_stores_take_no_path_that_leads_out(package: Path) -> None:
    with DirectoryStore(package) as store:
        for path in (
            "../secret.moe0",
            "experts/../../secret.moe0",
            "/etc/passwd",
            "",
            ".",
            "experts//l000/e0000.moe0",
            "experts/\0",
            "/".join(["d"] * 100),
        ):
            with pytest.raises(EvermindPackError):
                store.read(path, limit=1 << 20)


def test_a_shard_that_was_cut_while_open(package: Path) -> None:
    with open_package(package) as opened:
        opened.read_shard(0, 0)
        os.truncate(package / SHARD, 100)
        with pytest.raises(TruncatedError, match="expected 448 bytes from 0, found 100"):
            opened.read_shard(0, 0)


RANGES: list[tuple[dict[str, Any], str]] = [
    ({"offset": 64}, "ends at 512, experts/l000/e0000.moe0 has 448 bytes"),
    ({"offset": 2**53 - 64}, "ends at 9007199254741376"),
    ({"offset": 2**63}, "Expected `int` <= 9007199254740991"),
    ({"offset": -64}, "Expected `int` >= 0"),
    ({"bytes": 2**53 - 1}, "expected 448 bytes, found 9007199254740991"),
    ({"bytes": 0}, "expected 448 bytes, found 0"),
    ({"file": "experts/l000/e0001.moe0"}, "shards[1]: overlaps shards[0]"),
    ({"file": "graphs/head.onnx"}, "expected a .moe0 or .moe0p file"),
    ({"file": "../secret.moe0"}, "'../secret.moe0' is not in `files`"),
    ({"layer": 9}, "there is no expert 0 in layer 9"),
    ({"expert": 3}, "there is no expert 3 in layer 0"),
    ({"expert": 1}, "layer 0 expert 1 stands in shards[0] too"),
]


@pytest.mark.parametrize(("change", "message"), RANGES)
def test_hostile_ranges(package: Path, change: dict[str, Any], message: str) -> None:
    edit_manifest(package, lambda raw: raw["shards"][0].update(change))
    with pytest.raises(ManifestError) as caught:
        open_package(package)
    assert message in str(caught.value)
    assert not validate(package, deep=True).ok


def test_a_range_is_not_allocated_before_it_is_checked(package: Path) -> None:
    """A manifest that is consistent in itself claims a file of 8 PiB."""
    size = 2**53 - 64

    def change(raw: dict[str, Any]) -> None:
        raw["kinds"]["ffn"]["bytes"] = size
        for shard in raw["shards"]:
            shard["bytes"] = size
            raw["files"][shard["file"]]["bytes"] = size

    edit_manifest(package, change)
    report = validate(package, deep=True)
    assert report.exit_code == 3
    with open_package(package) as opened:
        with pytest.raises(IntegrityError, match="expected 9,007,199,254,740,928 bytes"):
            opened.read_file(SHARD)
        with pytest.raises(IntegrityError, match=SHARD):
            opened.read_shard(0, 0)


@pytest.mark.parametrize(
    ("location", "offset"),
    [
        ("/etc/passwd", 0),
        ("../../../../etc/passwd", 0),
        ("../graphs/resident.safetensors", 296),
        ("manifest.json", 0),
        ("expert.bin", 0),
        ("resident.safetensors", 1 << 40),
    ],
)
def test_graphs_that_reach_out(package: Path, location: str, offset: int) -> None:
    model = onnx.load_from_string((package / "graphs/head.onnx").read_bytes())
    model.graph.initializer[0].CopyFrom(external_tensor("scale", [4], location, offset, 16))
    replace_file(package, "graphs/head.onnx", model.SerializeToString())
    manifest = parse_manifest((package / "manifest.json").read_bytes())
    with open_package(package) as opened:
        info = inspect_graph(opened.read_file("graphs/head.onnx"), "graphs/head.onnx")
    with pytest.raises(GraphError, match=r"graphs/head.onnx: tensor 'scale'"):
        check_graph(
            info, "graphs/head.onnx", external=external_locations(manifest, "graphs/head.onnx")
        )
    report = validate(package, deep=True)
    assert "graph-external" in {item.code for item in report.errors}


def test_a_graph_that_reads_the_resident_header(package: Path) -> None:
    """Inside the file, but no tensor: the header's bytes are not weights."""
    model = onnx.load_from_string((package / "graphs/head.onnx").read_bytes())
    model.graph.initializer[0].CopyFrom(
        external_tensor("scale", [4], "resident.safetensors", 0, 16)
    )
    replace_file(package, "graphs/head.onnx", model.SerializeToString())
    report = validate(package, deep=True)
    assert [item.code for item in report.errors] == ["graph-external"]
    assert "not inside one f32 tensor" in report.errors[0].message


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("graphs/router.onnx", "graphs/head.onnx"),
        ("graphs/expert.onnx", "graphs/router.onnx"),
        ("graphs/head.onnx", "graphs/expert.onnx"),
    ],
)
def test_a_graph_that_is_not_the_plans(package: Path, path: str, other: str) -> None:
    """Digests fit, names do not: said so before ONNX Runtime sees the graph."""
    replace_file(package, path, tiny_graphs()[other])
    with pytest.raises(GraphError, match=r"\[graph-interface\]"), em.load(package) as model:
        model.forward({"x": np.ones((3, 4), np.float32)})
