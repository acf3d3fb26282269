"""The writer: what it refuses, what it replaces, and that nothing half-written stays."""

from __future__ import annotations

import ctypes
import os
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from evermind_manifests import PackageWriter, open_package
from evermind_manifests.errors import (
    ExportError,
    InputError,
    ManifestError,
    PathError,
    ShardError,
    UnsupportedError,
)
from evermind_manifests.staging import Staging

from tests.manifests.builders import tiny_manifest, tiny_shard, write_tiny


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_finish_nothing_is_left(tmp_path: Path) -> None:
    with PackageWriter(tmp_path / "new" / "folders" / "p") as writer:
        writer.add_file("parity.json", b"{}")
        assert listing(tmp_path) == ["new"]
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_after_an_error_nothing_is_left(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    def shard(layer: int, expert: int) -> bytes:
        if layer == 1:
            raise error
        return tiny_shard(layer, expert)

    with pytest.raises(error):
        write_tiny(tmp_path / name, layout="pool", shard=shard)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["p", "p.zip"])
def test_a_contradictory_package_is_not_written(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(ManifestError, match=r"'graphs/expert.onnx' is not in `files`"),
        PackageWriter(tmp_path / name) as writer,
    ):
        writer.finish(tiny_manifest())
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["p", "p.zip"])
def test_an_existing_package_is_kept_unless_told(tmp_path: Path, name: str) -> None:
    digest = write_tiny(tmp_path / name)
    with pytest.raises(ExportError, match="exists already"):
        write_tiny(tmp_path / name)
    with pytest.raises(ValueError, match="stop"), PackageWriter(tmp_path / name, overwrite=True):
        raise ValueError("stop")
    with open_package(tmp_path / name) as package:
        assert package.digest == digest
    other = write_tiny(tmp_path / name, overwrite=True, graphs={"profile.json": b"{}"})
    with open_package(tmp_path / name) as package:
        assert package.digest == other != digest
    assert listing(tmp_path) == [name]


def test_replacing_without_an_atomic_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "p")
    monkeypatch.setattr("evermind_manifests.staging._exchange", lambda one, other: False)
    digest = write_tiny(tmp_path / "p", overwrite=True, graphs={"profile.json": b"{}"})
    with open_package(tmp_path / "p") as package:
        assert package.digest == digest
    assert listing(tmp_path) == ["p"]


def test_an_exchange_that_was_interrupted_is_undone(tmp_path: Path) -> None:
    """Killed between its two renames, a replacement left the old package under another name."""
    digest = write_tiny(tmp_path / "p")
    (tmp_path / "p").rename(tmp_path / ".p.replaced")
    with pytest.raises(ExportError, match="exists already"):
        write_tiny(tmp_path / "p")
    with open_package(tmp_path / "p") as package:
        assert package.digest == digest
    write_tiny(tmp_path / "other").encode()
    (tmp_path / "other").rename(tmp_path / ".p.replaced")
    write_tiny(tmp_path / "p", overwrite=True)
    assert listing(tmp_path) == ["p"]


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def make_file(path: Path) -> None:
    path.write_text("years of work")


def make_link(path: Path) -> None:
    write_tiny(path.parent / "real")
    path.symlink_to("real")


def make_web_page(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"name": "page", "icons": []}')


def make_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thesis.txt", "years of work")


def make_torn_archive(path: Path) -> None:
    make_archive(path)
    path.write_bytes(path.read_bytes()[:-8])


def make_extension(path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("manifest.json", '{"manifest_version": 3, "name": "extension"}')


def make_compressed_extension(path: Path) -> None:
    make_extension(path, zipfile.ZIP_DEFLATED)


def make_encrypted_extension(path: Path) -> None:
    make_extension(path)
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    path.write_bytes(data)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_folder_with_a_pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "manifest.json")


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize(
    "make",
    [
        make_folder,
        make_file,
        make_link,
        make_web_page,
        make_archive,
        make_torn_archive,
        make_extension,
        make_compressed_extension,
        make_encrypted_extension,
        make_pipe,
        make_folder_with_a_pipe,
    ],
)
def test_only_a_package_is_ever_replaced(tmp_path: Path, make: Any, name: str) -> None:
    make(tmp_path / name)
    before = listing(tmp_path)
    with pytest.raises(ExportError, match="expected a package to replace"):
        write_tiny(tmp_path / name, overwrite=True)
    assert listing(tmp_path) == before


def test_a_pipe_that_is_named_as_a_manifest_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    write_tiny(tmp_path / "p")
    assert listing(tmp_path) == ["manifest.json", "p"]


@pytest.mark.parametrize("name", ["q", "q.zip", "experts/q", "manifest.json"])
def test_nothing_is_written_into_a_package(tmp_path: Path, name: str) -> None:
    write_tiny(tmp_path / "p")
    (tmp_path / "link").symlink_to("p")
    for folder in ("p", "link"):
        before = sorted((tmp_path / "p").rglob("*"))
        with pytest.raises(InputError, match="would be a file of the package"):
            write_tiny(tmp_path / folder / name, overwrite=True)
        assert sorted((tmp_path / "p").rglob("*")) == before


def test_a_folder_and_a_file_do_not_replace_each_other(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "a.zip")
    with pytest.raises(ExportError, match="do not replace each other"):
        write_tiny(tmp_path / "a.zip", overwrite=True)


def test_two_exports_to_one_destination(tmp_path: Path) -> None:
    with PackageWriter(tmp_path / "p") as first:
        first.add_file("parity.json", b"{}")
        with (
            pytest.raises(ExportError, match="another export to it is running"),
            PackageWriter(tmp_path / "p"),
        ):
            pass
        assert (tmp_path / ".p.partial" / "parity.json").exists()
    assert listing(tmp_path) == []


def test_a_leftover_is_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / ".p.partial"
    (leftover / "experts").mkdir(parents=True)
    (leftover / "experts" / "stray.moe0").write_bytes(b"old")
    (leftover / "link").symlink_to(tmp_path)
    write_tiny(tmp_path / "p")
    assert listing(tmp_path) == ["p"]
    assert not (tmp_path / "p" / "experts" / "stray.moe0").exists()


def test_a_foreign_scratch_folder_is_not_removed(tmp_path: Path) -> None:
    """Between publishing and tidying up, the scratch name may already be another export's."""
    one = Staging(tmp_path / "p", overwrite=False)
    one.claim()
    (one.folder / "manifest.json").write_text("{}")
    one.folder.rename(tmp_path / "elsewhere")
    one._scratch = None
    other = Staging(tmp_path / "p", overwrite=False)
    other.claim()
    one.discard()
    assert other.folder.is_dir()
    other.discard()


@pytest.mark.parametrize(
    ("path", "error"),
    [("../x.json", PathError), ("/x.json", PathError), ("run.py", UnsupportedError)],
)
def test_paths_are_checked_when_files_are_added(
    tmp_path: Path, path: str, error: type[Exception]
) -> None:
    with pytest.raises(error), PackageWriter(tmp_path / "p") as writer:
        writer.add_file(path, b"")
    assert listing(tmp_path) == []


def test_what_is_added_is_checked(tmp_path: Path) -> None:
    with PackageWriter(tmp_path / "p") as writer:
        writer.add_file("parity.json", b"{}")
        with pytest.raises(ExportError, match=r"parity.json: was added twice"):
            writer.add_file("parity.json", b"{}")
        writer.add_shard(0, 0, tiny_shard(0, 0))
        with pytest.raises(ExportError, match="layer 0 expert 0 was added twice"):
            writer.add_shard(0, 0, tiny_shard(0, 0))
        with pytest.raises(ExportError, match="the shard is of layer 0 expert 2"):
            writer.add_shard(0, 1, tiny_shard(0, 2))
        with pytest.raises(ShardError, match="layer 0 expert 1: magic"):
            writer.add_shard(0, 1, bytes(448))


def test_a_readme_of_ones_own_is_kept(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p", graphs={"README.md": b"# Mine\n"})
    assert (tmp_path / "p" / "README.md").read_bytes() == b"# Mine\n"


def test_a_destination_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="names no file or folder"):
        PackageWriter(tmp_path / "..")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot be written"):
        write_tiny(tmp_path / "file" / "p")


def test_the_exchange_is_there_on_this_system() -> None:
    """Otherwise the tests above would only ever see the fallback."""
    assert getattr(ctypes.CDLL(None), "renameat2", None) is not None


@pytest.mark.parametrize("layout", ["files", "pool"])
def test_a_shard_in_parts_is_the_shard_whole(tmp_path: Path, layout: Any) -> None:
    whole = write_tiny(tmp_path / "whole", layout=layout)

    class InParts(PackageWriter):
        def add_shard(self, layer: int, expert: int, data: Any) -> None:
            cuts = [0, len(data) // 2, len(data) // 2 + 1, len(data)]
            parts = (data[a:b] for a, b in pairwise(cuts))
            self.stream_shard(layer, expert, parts, len(data))

    assert write_tiny(tmp_path / "parts", layout=layout, writer_type=InParts) == whole


@pytest.mark.parametrize("layout", ["files", "pool"])
def test_parts_of_another_length_are_refused(tmp_path: Path, layout: Any) -> None:
    data = tiny_shard(0, 0)
    for parts in ((data[:-64], data[-63:]), (data, bytes(64))):
        with (
            pytest.raises(ExportError, match=f"layer 0 expert 0: expected {len(data):,} bytes"),
            PackageWriter(tmp_path / "p", layout=layout) as writer,
        ):
            writer.stream_shard(0, 0, iter(parts), len(data))
        assert listing(tmp_path) == []
