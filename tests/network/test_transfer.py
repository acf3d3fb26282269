"""push, pull, diff and the cache command, against servers and folders here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_manifests.errors import DigestError, ExportError, InputError, NetworkError
from evermind_manifests.package import open_package
from evermind_runtime.openers import open_location
from evermind_runtime.profile import LayerProfile, Profile, encode_profile
from evermind_runtime.stores import RemoteOptions
from evermind_runtime.transfer import copy_package, diff_manifests, open_target

from tests.cli.command_line import call
from tests.network.conftest import quick
from tests.network.server import Handler, Server, tree_digest
from tests.packages import LM_CONFIG, export, lm_source, random_source


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1, and v2 in which experts 3 of layer 0 and 5 of layer 2 differ; v2p is v2 as a pool."""
    root = tmp_path_factory.mktemp("versions")
    export(lm_source(), root / "v1")
    changed = random_source("evermind-lm", LM_CONFIG)
    for name, array in changed.tensors.items():
        if (".0." in name and "experts.3." in name) or (".2." in name and "experts.5." in name):
            changed.tensors[name] = (array + np.float32(0.25)).astype(np.float32)
    export(changed, root / "v2")
    export(changed, root / "v2p", layout="pool")
    return root


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVERMIND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def push(source: Path, destination: str, options: RemoteOptions) -> Any:
    with open_package(source) as package:
        return copy_package(package, open_target(destination, options))


def same_package(one: Path, other: Path) -> bool:
    return tree_digest(one) == tree_digest(other)


def test_diff_names_the_experts_and_the_bytes(versions: Path, capsys: Any) -> None:
    with open_package(versions / "v1") as old, open_package(versions / "v2") as new:
        found = diff_manifests(old.manifest, new.manifest)
        shards = [new.shard(0, 3), new.shard(2, 5)]
        assert diff_manifests(new.manifest, new.manifest).same
    assert found.experts == ((0, 3), (2, 5))
    others = set(found.changed) - {shard.file for shard in shards}
    assert others <= {"README.md", "parity.json"}
    assert found.fetch_blobs == 2 + len(others)
    code, out, _ = call(capsys, "diff", versions / "v1", versions / "v2", "--json")
    assert code == 0
    assert json.loads(out)["experts"] == [[0, 3], [2, 5]]
    code, out, _ = call(capsys, "diff", versions / "v1", versions / "v2p")
    assert code == 0
    assert "layer 0 expert 3, layer 2 expert 5" in out
    code, out, _ = call(capsys, "diff", versions / "v2", versions / "v2")
    assert "the same" in out


def test_push_to_a_folder_and_update_it(
    versions: Path, tmp_path: Path, options: RemoteOptions
) -> None:
    folder = tmp_path / "www" / "lm"
    first = push(versions / "v1", str(folder), options)
    assert first.kept == 0
    assert same_package(folder, versions / "v1")
    update = push(versions / "v2", str(folder), options)
    assert update.sent <= 4  # two experts, and what describes them
    assert same_package(folder, versions / "v2")
    # Files of the old package that the new one does not have are gone.
    push(versions / "v2p", str(folder), options)
    assert same_package(folder, versions / "v2p")
    assert push(versions / "v2p", str(folder), options).sent == 0


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_push_to_a_server(
    versions: Path,
    tmp_path: Path,
    serve: Callable[..., Server],
    options: RemoteOptions,
    scheme: str,
) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "lm").mkdir()
    server = serve(tmp_path / "www", writable=True)
    if scheme == "file":
        pytest.importorskip("obstore")
        destination = f"file://{tmp_path / 'www' / 'lm'}"
    else:
        destination = server.url + "lm"
    push(versions / "v1", destination, options)
    assert same_package(tmp_path / "www" / "lm", versions / "v1")
    update = push(versions / "v2", destination, options)
    assert update.sent <= 4
    assert same_package(tmp_path / "www" / "lm", versions / "v2")
    assert push(versions / "v2", destination, options).sent == 0
    assert not list((options.cache_folder / "pushes").iterdir())


def test_a_push_that_broke_goes_on(
    versions: Path, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    """Over an older version, whose manifest must not be believed for what was overwritten."""
    server = serve(tmp_path / "www", writable=True)
    place = server.url + "lm"
    push(versions / "v1", place, options)
    with open_package(versions / "v2") as package:
        last = package.shard(2, 5).file

    def refuse(handler: Handler, path: str) -> bool:
        if handler.command == "PUT" and path == f"lm/{last}":
            handler.answer(507, b"")
            return True
        return False

    server.behaviour.hook = refuse
    with pytest.raises(NetworkError, match="507"):
        push(versions / "v2", place, options)
    server.behaviour.hook = None
    server.forget()
    push(versions / "v2", place, options)
    puts = [path for command, path, _ in server.log if command == "PUT"]
    assert f"lm/{last}" in puts
    assert len(puts) == len(set(puts)) <= 4
    assert same_package(tmp_path / "www" / "lm", versions / "v2")

    # And the other way: broken off, then the old version again.
    push(versions / "v1", place, options)
    server.behaviour.hook = refuse
    with pytest.raises(NetworkError):
        push(versions / "v2", place, options)
    server.behaviour.hook = None
    push(versions / "v1", place, options)
    assert same_package(tmp_path / "www" / "lm", versions / "v1")


def test_push_bears_faults(
    versions: Path, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(tmp_path / "www", writable=True)

    def busy(handler: Handler, path: str) -> bool:
        if handler.command == "PUT" and handler.server.requests[path] % 3 == 1:
            handler.answer(503, b"", Retry_After="0")
            return True
        return False

    server.behaviour.hook = busy
    push(versions / "v1", server.url + "lm", options)
    assert same_package(tmp_path / "www" / "lm", versions / "v1")


def test_a_server_without_put(
    versions: Path, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(tmp_path)
    with pytest.raises(NetworkError, match="takes no PUT"):
        push(versions / "v1", server.url + "lm", options)


def test_a_damaged_source_is_not_pushed(
    versions: Path, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    export(lm_source(), tmp_path / "lm")
    with open_package(tmp_path / "lm") as package:
        path = package.shard(1, 1).file
    data = bytearray((tmp_path / "lm" / path).read_bytes())
    data[-1] ^= 1
    (tmp_path / "lm" / path).write_bytes(data)
    server = serve(tmp_path / "www", writable=True)
    for destination in (server.url + "lm", str(tmp_path / "copy")):
        with pytest.raises(DigestError, match="e0001"):
            push(tmp_path / "lm", destination, options)
    assert not (tmp_path / "www" / "lm" / path).exists()
    assert not (tmp_path / "copy" / path).exists()
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_a_folder_that_is_no_package_is_left_alone(
    versions: Path, tmp_path: Path, options: RemoteOptions
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_bytes(b"cat")
    with pytest.raises(ExportError, match="expected a package or an empty folder"):
        push(versions / "v1", str(photos), options)
    assert tree_digest(photos).keys() == {"cat.png"}
    page = tmp_path / "page"
    page.mkdir()
    (page / "manifest.json").write_text('{"name": "page"}')
    with pytest.raises(ExportError, match="expected a package or an empty folder"):
        push(versions / "v1", str(page), options)
    assert tree_digest(page).keys() == {"manifest.json"}
    before = tree_digest(versions / "v1")
    with pytest.raises(InputError, match="would be a file of the package"):
        push(versions / "v2p", str(versions / "v1" / "copy"), options)
    assert tree_digest(versions / "v1") == before
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "experts").symlink_to(photos)
    shutil.copy(versions / "v1" / "manifest.json", linked)
    with pytest.raises(ExportError, match="symlink"):
        push(versions / "v1", str(linked), options)
    assert tree_digest(photos).keys() == {"cat.png"}


@pytest.mark.parametrize("place", ["v1/", "v2p/"])
def test_pull_to_a_folder_goes_on_where_it_broke(
    versions: Path,
    tmp_path: Path,
    serve: Callable[..., Server],
    options: RemoteOptions,
    place: str,
) -> None:
    server = serve(versions)
    served = _contents(versions / place)
    broken = max(served, key=lambda path: len(served[path]))

    def cut(handler: Handler, path: str) -> bool:
        if path != place + broken:
            return False
        if handler.headers.get("Range"):
            handler.answer(403, b"")
        else:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(served[broken])))
            handler.end_headers()
            handler.send_body(path, served[broken][:9000])
            handler.close_connection = True
        return True

    server.behaviour.hook = cut
    out = tmp_path / "out"
    with open_location(server.url + place, options) as package:
        with pytest.raises(NetworkError):
            copy_package(package, open_target(str(out), options), concurrency=1)
        assert not (out / "manifest.json").exists()
        server.behaviour.hook = None
        before = dict(server.sent)
        copy_package(package, open_target(str(out), options), concurrency=1)
    assert same_package(out, versions / place)
    assert server.sent[place + broken] == len(served[broken])
    twice = [
        path
        for path in served
        if path != "manifest.json" and server.sent[place + path] > len(served[path])
    ]
    assert len(twice) <= 1  # the one that was on its way when the other failed
    assert before[place + broken] == 9000


def _contents(root: Path) -> dict[str, bytes]:
    return {
        os.path.relpath(path, root): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_pull_update_sends_only_what_changed(
    versions: Path, tmp_path: Path, serve: Callable[..., Server], capsys: Any
) -> None:
    server = serve(versions)
    out = tmp_path / "lm"
    assert call(capsys, "pull", server.url + "v1", "-o", out)[0] == 0
    server.forget()
    code, text, _ = call(capsys, "pull", server.url + "v2", "-o", out, "--json")
    assert code == 0
    assert same_package(out, versions / "v2")
    assert json.loads(text)["bytes_fetched"] < 100_000
    assert sum("experts" in path for path in server.requests) == 2


def test_pull_with_a_profile(
    versions: Path, tmp_path: Path, serve: Callable[..., Server], capsys: Any
) -> None:
    server = serve(versions)
    uses = [[0] * 8 for _ in range(3)]
    uses[0][3] = uses[1][1] = 5
    profile = Profile(
        "evermind.profile/1", tuple(LayerProfile(at, tuple(row)) for at, row in enumerate(uses))
    )
    (tmp_path / "hot.json").write_bytes(encode_profile(profile))
    for experts, count in (("none", 0), (tmp_path / "hot.json", 2), ("all", 22)):
        server.forget()
        code, _, err = call(capsys, "pull", server.url + "v1", "--experts", experts)
        assert code == 0, err
        assert sum("experts" in path for path in server.requests) == count
    code, _, err = call(capsys, "pull", server.url + "v1", "--experts", "profile")
    assert code == 2
    assert "profile.json" in err
    code, _, err = call(
        capsys, "pull", server.url + "v1", "--experts", "none", "-o", tmp_path / "x"
    )
    assert code == 2


def test_the_cache_command(
    versions: Path,
    serve: Callable[..., Server],
    capsys: Any,
    cache_of_its_own: Path,
) -> None:
    assert call(capsys, "cache", "ls")[0] == 0
    server = serve(versions)
    assert call(capsys, "pull", server.url + "v1", "-q")[0] == 0
    assert call(capsys, "pull", server.url + "v2", "--experts", "none", "-q")[0] == 0
    listed = json.loads(call(capsys, "cache", "ls", "--json")[1])
    one, two = sorted(listed["packages"], key=lambda package: str(package["location"]))
    assert one["cached_bytes"] == one["bytes"] > two["cached_bytes"] > 0
    assert call(capsys, "cache", "ls")[0] == 0
    assert call(capsys, "cache", "verify")[0] == 0

    victim = max(cache_of_its_own.glob("objects/*/*"), key=lambda path: path.stat().st_size)
    victim.chmod(0o644)
    with victim.open("r+b") as file:
        file.write(b"rot")
    code, out, _ = call(capsys, "cache", "verify", "--json")
    assert (code, json.loads(out)["damaged"]) == (3, [victim.name])
    assert not victim.exists()

    half = listed["bytes"] // 2
    code, out, _ = call(capsys, "cache", "gc", "--max-size", half, "--json")
    assert json.loads(out)["left_bytes"] <= half
    code, out, _ = call(capsys, "cache", "clear", "--json")
    assert json.loads(out)["left"] == 0
    assert json.loads(call(capsys, "cache", "ls", "--json")[1])["packages"] == []


def test_commands_take_urls(
    versions: Path, tmp_path: Path, serve: Callable[..., Server], capsys: Any
) -> None:
    server = serve(versions)
    url = server.url + "v1/"
    assert call(capsys, "inspect", url, "--json")[0] == 0
    assert set(server.requests) == {"v1/manifest.json"}
    code, out, err = call(capsys, "validate", url, "--deep", "--json")
    assert code == 0, err
    assert json.loads(out)["levels"] == ["structure", "files", "deep"]
    code, here, _ = call(
        capsys, "run", versions / "v1", "--tokens", "1,2", "--max-new", 4, "--json"
    )
    code, there, err = call(capsys, "run", url, "--tokens", "1,2", "--max-new", 4, "--json")
    assert json.loads(here)["tokens"] == json.loads(there)["tokens"], err
    code, _, err = call(capsys, "trace", url, "--tokens", "1", "-o", tmp_path / "t", "--max-new", 2)
    assert code == 0, err
    assert call(capsys, "pull", url, "-q")[0] == 0
    server.forget()
    assert call(capsys, "run", url, "--tokens", "1", "--max-new", 2, "--offline", "-q")[0] == 0
    assert not server.requests
    wrong = "0" * 64
    assert call(capsys, "run", url, "--tokens", "1", "--digest", wrong)[0] == 3
    assert call(capsys, "run", url, "--tokens", "1", "--digest", "short")[0] == 2
    for mistake in (
        ["run", "ftp://127.0.0.1/x", "--tokens", "1"],
        ["pull", versions / "v1"],
        ["push", versions / "v1", server.url + "x.zip"],
        ["cache", "ls", "--max-size", "1GB"],
        ["cache", "gc", "--max-size", "10%"],
        ["serve", versions / "v1", "--mount", "nothing"],
    ):
        code, out, err = call(capsys, *mistake)
        assert (mistake[0], code, out) == (mistake[0], 2, ""), err


def test_what_is_wrong_on_the_server_is_found(
    versions: Path, serve: Callable[..., Server], capsys: Any
) -> None:
    server = serve(versions)
    with open_package(versions / "v1") as package:
        path = "v1/" + package.shard(0, 0).file
    data = bytearray((versions / path).read_bytes())
    data[-1] ^= 1
    server.behaviour.replaced[path] = bytes(data)
    code, out, _ = call(capsys, "validate", server.url + "v1", "--deep", "--json")
    assert code == 3
    assert any(problem["place"] in path for problem in json.loads(out)["problems"])


def test_the_journal_of_another_place_does_not_count(
    versions: Path, tmp_path: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(tmp_path / "www", writable=True)
    push(versions / "v1", server.url + "a", options)
    push(versions / "v1", server.url + "b", options)
    assert same_package(tmp_path / "www" / "a", tmp_path / "www" / "b")
    assert quick(options.cache_folder) == options
