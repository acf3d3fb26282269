"""Servers that mean harm, or break what HTTP promises: bounded, contained, named."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from evermind_manifests.errors import (
    EvermindPackError,
    IntegrityError,
    LocationError,
    ManifestError,
    NetworkError,
)
from evermind_runtime.openers import open_location
from evermind_runtime.stores import RemoteOptions
from evermind_runtime.stores.http import AddressGuard, RefusedAddress
from evermind_runtime.stores.open_remote import open_remote_store

from tests.network.conftest import quick
from tests.network.server import Behaviour, Handler, Server, serving
from tests.packages import export, lm_source

SECRET = "hunter2"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("origin")
    export(lm_source(), root / "lm")
    (root / "data.json").write_bytes(bytes(range(256)) * 40)
    return root


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def start(root: Path, **behaviour: object) -> Server:
            return stack.enter_context(serving(root, Behaviour(**behaviour)))  # type: ignore[arg-type]

        yield start


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    return quick(tmp_path / "cache", retries=2)


def redirect(target: str, status: int = 302) -> Callable[[Handler, str], bool]:
    def hook(handler: Handler, path: str) -> bool:
        handler.answer(status, b"", Location=target)
        return True

    return hook


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "s3://bucket/x",
        "gopher://x/",
        "data:,x",
        "http://",
    ],
)
def test_redirects_to_other_schemes(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions, target: str
) -> None:
    server = serve(origin, hook=redirect(target))
    with pytest.raises(EvermindPackError) as caught:
        open_location(server.url, options)
    assert isinstance(caught.value, LocationError | NetworkError | ManifestError)


def test_redirects_without_end(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(origin, hook=redirect("/again"))
    with pytest.raises(NetworkError, match="more than 5 redirects"):
        open_location(server.url, options)
    assert server.requests.total() == 6


def test_redirects_are_followed_and_secrets_stay(
    origin: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    """To another server (here: another port) go neither the password nor the own headers."""
    cdn = serve(origin)
    options = quick(tmp_path, headers={"X-Token": SECRET})
    first = serve(origin)

    def hook(handler: Handler, path: str) -> bool:
        handler.answer(307, b"", Location=cdn.url + path)
        return True

    first.behaviour.hook = hook
    url = first.url.replace("http://", f"http://user:{SECRET}@") + "lm"
    with open_location(url, options) as package:
        package.read_file("README.md")
        assert SECRET not in package.location
    assert all(first.authorizations)
    assert cdn.requests
    assert not any(cdn.authorizations)


def test_private_addresses_behind_a_public_host() -> None:
    """What the socket is connected to counts, whatever the name resolved to before."""
    guard = AddressGuard("models.example.org", allow_private=False)
    guard.check("models.example.org", "93.184.216.34")
    guard.check("cdn.example.net", "8.8.8.8")
    for address in ("127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "::ffff:10.0.0.1"):
        with pytest.raises(RefusedAddress):
            guard.check("cdn.example.net", address)
    AddressGuard("models.example.org", allow_private=True).check("cdn.example.net", "10.0.0.1")
    inside = AddressGuard("intranet", allow_private=False)
    inside.check("intranet", "10.0.0.5")
    inside.check("files.intranet", "10.0.0.6")


def test_the_guard_sees_every_connection(
    origin: Path,
    serve: Callable[..., Server],
    options: RemoteOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A redirect from a host taken for public to one on loopback is refused unasked."""
    inner = serve(origin)
    outer = serve(origin, hook=redirect(inner.url.replace("127.0.0.1", "localhost") + "lm/x"))
    import evermind_runtime.stores.http as http

    port = outer.server_address[1]
    real = http.AddressGuard.check

    def check(self: AddressGuard, host: str, address: str) -> None:
        real(self, host, "8.8.8.8" if host == "127.0.0.1" else address)

    monkeypatch.setattr(http.AddressGuard, "check", check)
    with pytest.raises(LocationError, match="no public address"):
        open_location(f"http://127.0.0.1:{port}/lm", options)
    assert not inner.requests


def test_compressed_bodies(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(origin, headers={"Content-Encoding": "gzip"})
    server.behaviour.replaced["lm/manifest.json"] = gzip.compress(b"{}" * 10_000)
    with pytest.raises(NetworkError, match="gzip-encoded"):
        open_location(server.url + "lm", options)


def test_a_body_without_end(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    def endless(handler: Handler, path: str) -> bool:
        handler.send_response(200)
        handler.close_connection = True
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b" " * 65536)
        except OSError:
            return True

    server = serve(origin, hook=endless)
    with open_remote_store(server.url, options) as store, pytest.raises(IntegrityError) as caught:
        store.read("data.json", limit=1_000_000)
    assert "at most 1,000,000" in str(caught.value)


def test_a_body_that_drips(
    origin: Path,
    serve: Callable[..., Server],
    tmp_path: Path,
) -> None:
    """Each byte comes in time, and the whole never would."""

    def drip(handler: Handler, path: str) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.close_connection = True
        handler.end_headers()
        try:
            for _ in range(2000):
                handler.wfile.write(b" ")
                time.sleep(0.01)
        except OSError:
            pass
        return True

    server = serve(origin, hook=drip)
    begun = time.monotonic()
    with (
        open_remote_store(server.url, quick(tmp_path, retries=1, timeout=0.1)) as store,
        pytest.raises(NetworkError, match="slower than"),
    ):
        store.read("data.json", limit=1_000_000)
    assert time.monotonic() - begun < 15


def test_silence(origin: Path, serve: Callable[..., Server], tmp_path: Path) -> None:
    def wait(handler: Handler, path: str) -> bool:
        time.sleep(1)
        handler.close_connection = True
        return True

    server = serve(origin, hook=wait)
    with pytest.raises(NetworkError, match="no answer in time"):
        open_location(server.url, quick(tmp_path, retries=1, timeout=0.1))


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-9/100", "bytes 11-19/10240", "bytes 10-5/10240", "items 10-19/10240", "", "x" * 5000],
)
def test_ranges_that_are_not_the_ones_asked_for(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions, content_range: str
) -> None:
    def wrong(handler: Handler, path: str) -> bool:
        handler.answer(206, b"0123456789", Content_Range=content_range)
        return True

    server = serve(origin, hook=wrong)
    with open_remote_store(server.url, options) as store, pytest.raises(IntegrityError) as caught:
        store.read_into("data.json", 10, memoryview(bytearray(10)))
    assert "asked for bytes 10-19" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("length", ["-5", "1e9", "9" * 400, "x"])
def test_lengths_that_are_none(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions, length: str
) -> None:
    def odd(handler: Handler, path: str) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", length)
        handler.close_connection = True
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(b"{}")
        return True

    server = serve(origin, hook=odd)
    with pytest.raises(EvermindPackError):
        open_location(server.url, options)
    with open_remote_store(server.url, options) as store:
        buffer = memoryview(bytearray(10))
        with pytest.raises(EvermindPackError):
            store.read_into("data.json", 0, buffer)


@pytest.mark.parametrize("status", [204, 400, 401, 403, 418, 451, 501])
def test_answers_that_will_not_get_better_are_not_asked_for_again(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions, status: int
) -> None:
    def refuse(handler: Handler, path: str) -> bool:
        handler.answer(status, b"")
        return True

    server = serve(origin, hook=refuse)
    with pytest.raises(NetworkError, match=f"answers {status}"):
        open_location(server.url, options)
    assert server.requests.total() == 1


def test_a_manifest_over_the_limit_is_not_read(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    def huge(handler: Handler, path: str) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.close_connection = True
        handler.end_headers()
        return True

    server = serve(origin, hook=huge)
    with pytest.raises(ManifestError, match="expected at most"):
        open_location(server.url, options)
    assert server.requests.total() == 1


def test_paths_that_climb(
    origin: Path, serve: Callable[..., Server], options: RemoteOptions
) -> None:
    server = serve(origin)
    with open_remote_store(server.url + "lm", options) as store:
        for path in ("../data.json", "/data.json", "a/../../data.json", "a\\b", "http://x/"):
            with pytest.raises(ManifestError):
                store.size(path)
    assert not server.requests
