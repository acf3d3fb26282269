"""Stores across a network, held to the contract of all stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from evermind_manifests.errors import ClosedError
from evermind_manifests.store import Store
from evermind_runtime.stores import RemoteOptions
from evermind_runtime.stores.open_remote import open_remote_store

from tests.manifests.store_tests import FILES, StoreTests
from tests.manifests.test_stores import write_folder, write_zip
from tests.network.server import Server


class RemoteStoreTests(StoreTests):
    """The same, but for what is about descriptors."""

    def test_closing_waits_for_the_reads_that_run(  # type: ignore[override]
        self, store: Store
    ) -> None:
        """Covered for sockets by `test_a_closed_store_says_so`."""
        store.size("manifest.json")
        store.close()
        with pytest.raises(ClosedError):
            store.read("manifest.json", limit=10)


class TestHttpFolder(RemoteStoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions) -> Store:
        return open_remote_store(serve(write_folder(tmp_path / "p")).url, options)

    def test_paths(self, store: Store) -> None:
        assert list(store.paths()) == []  # a web server does not list its files


class TestHttpWithoutRanges(TestHttpFolder):
    @pytest.fixture
    def store(self, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions) -> Store:
        server = serve(write_folder(tmp_path / "p"), ranges=False)
        return open_remote_store(server.url, options)


class TestHttpWithFaults(TestHttpFolder):
    @pytest.fixture
    def store(self, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions) -> Store:
        server = serve(write_folder(tmp_path / "p"), faults=0.3, seed=3)
        return open_remote_store(server.url, options)


class TestHttpZip(RemoteStoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions) -> Store:
        (tmp_path / "p").mkdir()
        write_zip(tmp_path / "p" / "p.zip")
        return open_remote_store(serve(tmp_path / "p").url + "p.zip", options)


class TestObjectFolder(RemoteStoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path, options: RemoteOptions) -> Store:
        pytest.importorskip("obstore")
        return open_remote_store(f"file://{write_folder(tmp_path / 'p')}", options)


class TestObjectZip(RemoteStoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path, options: RemoteOptions) -> Store:
        pytest.importorskip("obstore")
        return open_remote_store(f"file://{write_zip(tmp_path / 'p.zip')}", options)


def test_the_contract_has_files() -> None:
    assert len(FILES) > 64  # more than descriptors are kept open
