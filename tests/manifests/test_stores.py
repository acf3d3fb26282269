"""Both stores, held to the same contract, and how they are told apart."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from evermind_exporters import read_source
from evermind_manifests.errors import LocationError, ManifestError, MissingFileError
from evermind_manifests.package import open_package
from evermind_manifests.store import DirectoryStore, Store, open_store
from evermind_manifests.zip_store import ZipStore

from tests.manifests.store_tests import FILES, StoreTests


def write_folder(root: Path) -> Path:
    for path, data in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("experts")
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


class TestDirectoryStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return DirectoryStore(write_folder(tmp_path))

    def test_hidden_files_are_not_listed(self, tmp_path: Path) -> None:
        write_folder(tmp_path)
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "x").write_bytes(b"")
        (tmp_path / ".gitattributes").write_bytes(b"")
        with DirectoryStore(tmp_path) as store:
            assert list(store.paths()) == sorted(FILES)

    def test_the_folder_may_be_reached_through_a_link(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "real")
        (tmp_path / "link").symlink_to("real")
        with DirectoryStore(tmp_path / "link") as store:
            assert store.read("manifest.json", limit=2) == b"{}"

    def test_no_descriptor_leaks(self, tmp_path: Path) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        with DirectoryStore(write_folder(tmp_path)) as store:
            for path in FILES:
                store.size(path)
            for path in ("nothing", "experts", "manifest.json/x"):
                with pytest.raises(MissingFileError):
                    store.size(path)
            list(store.paths())
        assert len(list(Path("/proc/self/fd").iterdir())) == before


class TestZipStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return ZipStore(write_zip(tmp_path / "p.zip"))

    def test_hidden_files_are_not_listed(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(write_zip(tmp_path / "p.zip"), "a") as archive:
            archive.writestr(".gitattributes", b"")
            archive.writestr(".cache/x", b"")
        with ZipStore(tmp_path / "p.zip") as store:
            assert list(store.paths()) == sorted(FILES)


@pytest.mark.parametrize("make", [write_folder, lambda root: write_zip(root / "p.zip")])
def test_extents(tmp_path: Path, make: object) -> None:
    with open_store(make(tmp_path)) as store:  # type: ignore[operator]
        assert isinstance(store, DirectoryStore | ZipStore)
        for path, data in FILES.items():
            fd, offset, size = store.open_extent(path)
            try:
                assert os.pread(fd, size, offset) == data
            finally:
                os.close(fd)


def test_a_location_is_told_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "looks-like.zip"
    folder.mkdir()
    write_folder(folder)
    archive = write_zip(tmp_path / "no-suffix")
    assert isinstance(open_store(folder), DirectoryStore)
    assert isinstance(open_store(archive), ZipStore)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ManifestError, match="found a file that begins with 68 65 6c 6c"):
        open_store(tmp_path / "text")


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_bytes(b"")
    return folder / "file" / "package"


def locked(folder: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "locked").mkdir(mode=0)
    return folder / "locked"


NOWHERE: list[tuple[Callable[[Path], Path], str]] = [
    (lambda folder: folder / "nothing", "nothing: there is no such folder or file"),
    (lambda folder: folder / ("long" * 100), "long: File name too long"),
    (lambda folder: folder.joinpath(*["long"] * 2000), "…"),
    (lambda folder: folder / "a\0b", "null"),
    (fifo, "fifo: expected a"),
    (loop, "loop: Too many levels"),
    (below_a_file, "Not a directory"),
    (locked, "locked: Permission denied"),
]


@pytest.mark.parametrize(("make", "message"), NOWHERE, ids=[text for _, text in NOWHERE])
@pytest.mark.parametrize("opener", [open_store, open_package, ZipStore, read_source])
def test_a_location_that_cannot_be_read(
    tmp_path: Path,
    make: Callable[[Path], Path],
    message: str,
    opener: Callable[[Path], object],
) -> None:
    with pytest.raises(LocationError) as caught:
        opener(make(tmp_path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, FileNotFoundError)
