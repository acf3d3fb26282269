"""Packages over the network: what is fetched, what is kept, what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import (
    DigestError,
    EvermindPackError,
    IntegrityError,
    LocationError,
    ManifestError,
    NetworkError,
    OfflineError,
    ShardDigestError,
)
from evermind_manifests.package import open_package
from evermind_runtime.openers import open_location
from evermind_runtime.stores import RemoteOptions
from evermind_runtime.stores.cached import CachedStore, CacheWarning
from evermind_runtime.stores.disk_cache import DiskCache
from evermind_runtime.stores.warm_up import files_of_every_run
from evermind_runtime.trace import read_trace

from tests.network.conftest import quick
from tests.network.server import Handler, Server
from tests.packages import LM_CONFIG, export, lm_source, random_source

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder, as a pool and as one file."""
    root = tmp_path_factory.mktemp("origin")
    export(lm_source(), root / "files")
    export(lm_source(), root / "pool", layout="pool")
    export(lm_source(), root / "lm.zip", layout="pool")
    export(lm_source(), root / "files.zip")
    return root


@pytest.fixture(scope="module")
def expected(packages: Path) -> list[int]:
    with em.load(packages / "files") as model:
        return [piece.token for piece in model.generate(PROMPT, max_new_tokens=8)]


def tokens(location: str, options: RemoteOptions, **load: Any) -> list[int]:
    with em.load(location, remote=options, **load) as model:
        return [piece.token for piece in model.generate(PROMPT, max_new_tokens=8)]


@pytest.mark.parametrize("place", ["files/", "files", "pool/", "lm.zip", "files.zip"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_package_runs_from_a_static_server(
    packages: Path,
    expected: list[int],
    serve: Callable[..., Server],
    options: RemoteOptions,
    place: str,
    ranges: bool,
) -> None:
    server = serve(packages, ranges=ranges)
    assert tokens(server.url + place, options) == expected
    assert tokens(server.url + place, options, budget="25%") == expected
    server.shutdown()
    assert tokens(server.url + place, quick(options.cache_folder, offline=True)) == expected


@pytest.mark.parametrize("place", ["files", "pool", "lm.zip"])
def test_bytes_before_the_first_token(
    serve: Callable[..., Server], tmp_path: Path, options: RemoteOptions, place: str
) -> None:
    """At most the resident part, the routed experts and 5 %."""
    config = {**LM_CONFIG, "dModel": 96, "hiddenDim": 384, "numExperts": 16, "vocabSize": 512}
    source = random_source("evermind-lm", config)
    layout = "files" if place == "files" else "pool"
    folder = export(source, tmp_path / "origin" / place, layout=layout)
    server = serve(tmp_path / "origin")
    with em.load(server.url + place, remote=options) as model:
        model.trace(tmp_path / "trace")
        next(iter(model.generate(PROMPT, max_new_tokens=1)))
        model.trace(None)
        fetched = server.total_sent
        manifest = model.manifest
    routed = {
        (step.layer, expert)
        for step in read_trace(tmp_path / "trace").steps
        for token in step.tokens
        for expert in token
    }
    with open_package(folder) as package:
        resident = sum(manifest.files[path].bytes for path in files_of_every_run(manifest))
        resident += package.store.size("manifest.json")
        experts = sum(package.shard(*key).bytes for key in routed)
    everything = sum(entry.bytes for entry in manifest.files.values())
    assert 0 < len(routed) < len(manifest.shards)
    assert fetched <= (resident + experts) * 1.05
    assert fetched < everything


def test_nothing_is_fetched_twice(
    packages: Path, expected: list[int], serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(packages)
    assert tokens(server.url + "files", options) == expected
    assert max(server.requests.values()) == 1
    server.forget()
    assert tokens(server.url + "files", options) == expected
    assert set(server.requests) == {"files/manifest.json"}
    server.forget()
    with em.load(server.url + "pool", remote=options):
        # Another package with the same graphs and weights: only what differs.
        assert not any("resident" in path for path in server.requests)


def test_thirty_per_cent_faults(
    packages: Path, expected: list[int], serve: Callable[..., Server], options: RemoteOptions
) -> None:
    for seed, place in enumerate(["files", "pool", "lm.zip"]):
        cache = options.cache_folder / str(seed)
        server = serve(packages, faults=0.3, seed=seed)
        begun = time.monotonic()
        assert tokens(server.url + place, quick(cache)) == expected
        # Generous: no fault makes the client wait, so none adds more than a pause.
        assert time.monotonic() - begun < 60
        assert sum(server.faults.values()) > 2


def test_a_server_that_only_fails_is_given_up(
    packages: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(packages, faults=1.0)
    with pytest.raises((NetworkError, IntegrityError), match=r"\(4 attempts\)"):
        em.load(server.url + "files", remote=quick(tmp_path, retries=3))
    assert server.requests.total() == 4


def test_an_update_fetches_what_changed(
    serve: Callable[..., Server], tmp_path: Path, options: RemoteOptions
) -> None:
    """A second version with two other experts costs two shards and the manifest."""
    first = lm_source()
    second = random_source("evermind-lm", LM_CONFIG)
    changed = [name for name in second.tensors if ".experts.3." in name][:4]
    for name in changed:
        second.tensors[name] = second.tensors[name] + np.float32(0.25)
    origin = tmp_path / "origin"
    export(first, origin / "v1")
    export(second, origin / "v2")
    server = serve(origin)
    with open_location(server.url + "v1", options) as package:
        store = package.store
        assert isinstance(store, CachedStore)
        store.fetch(store.blobs_of(package.manifest.files))
        old = {shard.sha256 for shard in package.manifest.shards}
    server.forget()
    with open_location(server.url + "v2", options) as package:
        store = package.store
        assert isinstance(store, CachedStore)
        store.fetch(store.blobs_of(package.manifest.files))
        new = {shard.sha256: shard for shard in package.manifest.shards}
    differing = {new[digest].file for digest in new.keys() - old}
    fetched = {path.removeprefix("v2/") for path in server.requests}
    assert {path for path in fetched if path.startswith("experts")} == differing
    assert len(differing) in (1, 2)
    assert not any("resident" in path for path in fetched)


CHILD = """
import sys, evermind_runtime as em
from pathlib import Path
from tests.network.conftest import quick
url, cache = sys.argv[1:3]
with em.load(url, remote=quick(Path(cache))) as model:
    print([piece.token for piece in model.generate([1, 2, 3], max_new_tokens=8)])
"""


def child(url: str, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, url, str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_two_processes_share_a_cache_and_no_download(
    packages: Path, expected: list[int], serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(packages, latency=0.01)
    children = [child(server.url + "files", options.cache_folder) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in children]
    for out, err in outputs:
        assert json.loads(out) == expected, err
    server.requests.pop("files/manifest.json")
    assert max(server.requests.values()) == 1


def test_killed_in_the_middle_and_started_again(
    serve: Callable[..., Server], tmp_path: Path, options: RemoteOptions
) -> None:
    """What had arrived when the process was killed is not asked for again."""
    config = {**LM_CONFIG, "vocabSize": 2048, "dModel": 64}
    export(random_source("evermind-lm", config), tmp_path / "origin" / "lm")
    # Slow enough that the resident part is on its way for seconds.
    server = serve(tmp_path / "origin", rate=200_000.0)
    process = child(server.url + "lm", options.cache_folder)
    partial = options.cache_folder / "partial"
    resident = "lm/graphs/resident.safetensors"
    while not (server.sent[resident] > 60_000 and any(partial.glob("*.part"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {part.name[:64]: part.stat().st_size for part in partial.glob("*.part")}
    kept |= {entry.name: entry.stat().st_size for entry in options.cache_folder.glob("objects/*/*")}
    assert any(kept.values())
    server = serve(tmp_path / "origin")  # the old one still counts what it tries to send
    with em.load(server.url + "lm", remote=options) as model:
        files = model.manifest.files
        for path, entry in files.items():
            if path in files_of_every_run(model.manifest):
                expected = entry.bytes - kept.get(entry.sha256, 0)
                assert server.sent[f"lm/{path}"] == expected, path
        assert sum(kept.get(entry.sha256, 0) for entry in files.values()) > 0


def test_a_wrong_shard_is_fetched_once_more_and_then_refused(
    packages: Path, expected: list[int], serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(packages)
    with open_package(packages / "files") as package:
        paths = ["files/" + shard.file for shard in package.manifest.shards]
    for path in paths:
        data = bytearray((packages / path).read_bytes())
        data[-1] ^= 1
        server.behaviour.replaced[path] = bytes(data)
    with pytest.raises(ShardDigestError, match="sha256 mismatch"):
        tokens(server.url + "files", options)
    # Twice by who needs it, and once before, in the background.
    assert max(server.requests[path] for path in paths) in (2, 3)

    def once(handler: Handler, path: str) -> bool:
        if handler.server.requests[path] == 2:
            server.behaviour.replaced.pop(path, None)
        return False

    server.forget()
    server.behaviour.hook = once
    assert tokens(server.url + "files", options) == expected


def test_a_length_other_than_the_manifest_s(
    packages: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(packages)
    with open_package(packages / "files") as package:
        path = package.manifest.shards[0].file
        size = package.manifest.shards[0].bytes
    server.behaviour.replaced["files/" + path] = b"x" * (size + 1)
    with (
        open_location(server.url + "files", options) as remote,
        pytest.raises(IntegrityError) as caught,
    ):
        remote.read_file(path)
    assert f"expected {size:,} bytes (manifest.json)" in str(caught.value)
    assert f"the server has {size + 1:,}" in str(caught.value)


def test_a_file_replaced_in_the_middle_is_never_mixed(
    packages: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    """The first body breaks, and the rest would come from another file of the same length."""
    server = serve(packages)
    path = "files/graphs/resident.safetensors"
    whole = (packages / path).read_bytes()

    def swap(handler: Handler, asked: str) -> bool:
        if asked != path or handler.server.requests[path] > 1:
            return False
        server.behaviour.replaced[path] = bytes(len(whole))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(whole)))
        handler.send_header("ETag", handler.tag(whole))
        handler.end_headers()
        handler.wfile.write(whole[:1000])
        handler.close_connection = True
        return True

    server.behaviour.hook = swap
    with (
        open_location(server.url + "files", options) as package,
        pytest.raises(DigestError) as caught,
    ):
        package.read_file("graphs/resident.safetensors")
    # Begun again from the first byte, where it was all of the other file.
    assert server.log[-1] == ("GET", path, None)
    assert "found    " in str(caught.value)


def test_a_pinned_package(
    packages: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(packages)
    with open_package(packages / "files") as package:
        digest = package.digest
    pinned = quick(options.cache_folder, digest=digest)
    open_location(server.url + "files", pinned).close()
    open_location(packages / "files", pinned).close()
    server.forget()
    open_location(server.url + "files", pinned).close()
    assert not server.requests  # the cache has it, and the digest says which
    fresh = quick(options.cache_folder / "fresh", digest=digest)
    for place in (server.url + "pool", packages / "pool"):
        with pytest.raises(DigestError, match=digest):
            open_location(place, fresh)


def test_offline(packages: Path, serve: Callable[..., Server], options: RemoteOptions) -> None:
    server = serve(packages)
    offline = quick(options.cache_folder, offline=True)
    with pytest.raises(OfflineError, match="not in the cache"):
        open_location(server.url + "files", offline)
    open_location(server.url + "files", options).close()
    server.forget()
    with open_location(server.url + "files", offline) as package:
        with pytest.raises(OfflineError, match="pull"):
            package.read_file("README.md")
        assert package.store.size("README.md") > 0
    assert not server.requests


def test_a_cache_that_cannot_be_written(
    packages: Path, expected: list[int], serve: Callable[..., Server], tmp_path: Path
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache should be")
    server = serve(packages)
    with pytest.warns(CacheWarning, match="the cache cannot be used"):
        assert tokens(server.url + "pool", quick(blocked / "cache")) == expected


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_cache_smaller_than_the_package(
    packages: Path,
    expected: list[int],
    serve: Callable[..., Server],
    options: RemoteOptions,
    share: float,
) -> None:
    size = sum(path.stat().st_size for path in (packages / "files").rglob("*") if path.is_file())
    limit = int(size * share)
    server = serve(packages)
    small = quick(options.cache_folder, cache_bytes=limit)
    assert tokens(server.url + "files", small, budget="25%") == expected
    cache = DiskCache(options.cache_folder, limit)
    assert sum(entry.bytes for entry in cache.entries()) <= limit


def test_prefetch_by_profile(
    packages: Path, serve: Callable[..., Server], tmp_path: Path, options: RemoteOptions
) -> None:
    server = serve(packages)
    with open_location(server.url + "files", options) as package:
        store = package.store
        assert isinstance(store, CachedStore)
        hot = store.blobs_of_experts([(0, 1), (2, 7), (1, 4)])
        store.prefetch(hot)
        deadline = time.monotonic() + 60
        while store.missing(hot):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert sorted(path for path in server.requests if "experts" in path) == sorted(
            f"files/{blob.path}" for blob in hot
        )
        assert store.fetch(hot) == 0
    with pytest.raises(EvermindPackError, match=r"expected a profile\.json"):
        em.load(server.url + "files", remote=quick(options.cache_folder, prefetch=True))


@pytest.mark.parametrize(
    ("location", "error", "message"),
    [
        ("ftp://127.0.0.1/x", LocationError, "expected .*https"),
        ("http:///x", LocationError, "without a host"),
        ("http://a b/", LocationError, "percent-encode|no host"),
        ("http://127.0.0.1:99999/x", LocationError, "malformed"),
        (
            "http://user:secret@127.0.0.1:1/x?sig=secret",
            NetworkError,
            "/x/manifest.json: Connection ref",
        ),
    ],
)
def test_places_that_cannot_be(
    options: RemoteOptions, location: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_location(location, options)
    assert "secret" not in str(caught.value)


def test_what_is_no_package(
    packages: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(packages)
    with pytest.raises(ManifestError, match="not a package"):
        open_location(server.url + "nothing", options)
    server.behaviour.replaced["files/manifest.json"] = b"x" * 100
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        open_location(server.url + "files", options)
    assert not (options.cache_folder / "packages").exists()
