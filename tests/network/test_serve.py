"""The static server: what browsers and other machines are told, and nothing they should not."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.parser import BytesParser
from pathlib import Path

import evermind_runtime as em
import pytest
from evermind_manifests.errors import EvermindPackError, InputError, LocationError
from evermind_manifests.package import open_package
from evermind_runtime.openers import open_location
from evermind_runtime.serving import PackageServer
from evermind_runtime.serving.static import Options
from evermind_runtime.stores import RemoteOptions

from tests.network.conftest import quick
from tests.packages import export, lm_source


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    export(lm_source(), root / "lm")
    export(lm_source(), root / "lm.zip", layout="pool")
    (root / "page").mkdir()
    (root / "page" / "app.mjs").write_text("export {}")
    (root / "page" / "ort.wasm").write_bytes(b"\0asm")
    (root / "page" / ".secret").write_text("no")
    (root / "outside.json").write_text("no")
    (root / "page" / "link.json").symlink_to(root / "outside.json")
    return root


Start = Callable[..., PackageServer]


@pytest.fixture
def start(packages: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(name: str = "lm", **options: object) -> PackageServer:
            package = stack.enter_context(open_package(packages / name))
            mounts = options.pop("mounts", None)
            server = stack.enter_context(
                PackageServer(package, port=0, mounts=mounts, options=Options(**options))  # type: ignore[arg-type]
            )
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            stack.callback(server.shutdown)
            return server

        yield begin


def ask(
    server: PackageServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=sent)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("name", ["lm", "lm.zip"])
def test_every_file_with_its_digest(packages: Path, start: Start, name: str) -> None:
    server = start(name)
    with open_package(packages / name) as package:
        manifest = package.manifest
    for path, entry in manifest.files.items():
        status, headers, data = ask(server, f"/{path}")
        assert status == 200
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        assert headers["etag"] == f'"{entry.sha256}"'
        assert headers["cache-control"] == "no-cache"
        assert headers["accept-ranges"] == "bytes"
        assert "content-encoding" not in headers
        status, headers, data = ask(server, f"/{path}", "HEAD")
        assert (status, data, int(headers["content-length"])) == (200, b"", entry.bytes)
    assert ask(server, "/manifest.json")[1]["content-type"] == "application/json"
    assert ask(server, "/README.md")[1]["content-type"].startswith("text/markdown")
    resident = manifest.resident
    assert ask(server, f"/{resident}")[1]["content-type"] == "application/octet-stream"


def test_ranges(packages: Path, start: Start) -> None:
    server = start()
    path = "graphs/resident.safetensors"
    whole = (packages / "lm" / path).read_bytes()
    size = len(whole)
    for asked, begin, end in (
        ("0-9", 0, 10),
        ("-7", size - 7, size),
        (f"{size - 3}-", size - 3, size),
    ):
        status, headers, data = ask(server, f"/{path}", Range=f"bytes={asked}")
        assert (status, data) == (206, whole[begin:end])
        assert headers["content-range"] == f"bytes {begin}-{end - 1}/{size}"
    status, headers, _ = ask(server, f"/{path}", Range=f"bytes={size}-")
    assert (status, headers["content-range"]) == (416, f"bytes */{size}")
    assert ask(server, f"/{path}", Range="bytes=x")[0] == 416
    assert ask(server, f"/{path}", Range="furlongs=1-2")[0] == 200
    etag = ask(server, f"/{path}", "HEAD")[1]["etag"]
    assert ask(server, f"/{path}", Range="bytes=0-1", If_Range=etag)[0] == 206
    assert ask(server, f"/{path}", Range="bytes=0-1", If_Range='"old"')[0] == 200


def test_several_ranges(packages: Path, start: Start) -> None:
    path = "graphs/resident.safetensors"
    whole = (packages / "lm" / path).read_bytes()
    status, headers, data = ask(start(), f"/{path}", Range="bytes=0-3,100-109")
    assert status == 206
    message = BytesParser().parsebytes(
        f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + data
    )
    parts = message.get_payload()
    assert isinstance(parts, list)
    assert [part.get_payload(decode=True) for part in parts] == [whole[:4], whole[100:110]]  # type: ignore[union-attr]
    assert int(headers["content-length"]) == len(data)


def test_caches(start: Start) -> None:
    server = start()
    _, headers, _ = ask(server, "/README.md")
    etag = headers["etag"]
    for sent in (etag, f'W/{etag}, "x"', "*"):
        status, headers, data = ask(server, "/README.md", If_None_Match=sent)
        assert (status, data) == (304, b"")
    assert ask(server, "/README.md", If_None_Match='"x"')[0] == 200
    digest = etag.strip('"')
    status, headers, _ = ask(server, f"/README.md?sha256={digest}")
    assert status == 200
    assert "immutable" in headers["cache-control"]
    assert ask(server, "/README.md?sha256=" + "0" * 64)[0] == 404


def test_pages_of_other_origins(start: Start) -> None:
    server = start()
    status, headers, _ = ask(server, "/manifest.json", Origin="https://example.org")
    assert headers["access-control-allow-origin"] == "*"
    assert "Content-Range" in headers["access-control-expose-headers"]
    assert "cross-origin-opener-policy" not in headers
    status, headers, data = ask(
        server, "/manifest.json", "OPTIONS", Access_Control_Request_Headers="range"
    )
    assert (status, data) == (204, b"")
    assert "Range" in headers["access-control-allow-headers"]
    closed = start(cors=None, isolate=True)
    _, headers, _ = ask(closed, "/manifest.json")
    assert "access-control-allow-origin" not in headers
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-embedder-policy"] == "require-corp"
    _, headers, _ = ask(start(cors="https://example.org"), "/manifest.json")
    assert (headers["access-control-allow-origin"], headers["vary"]) == (
        "https://example.org",
        "Origin",
    )


def test_only_what_the_manifest_names(packages: Path, start: Start) -> None:
    (packages / "lm" / "notes.md").write_text("private")
    server = start(mounts={"page": packages / "page"})
    for path in (
        "/notes.md",
        "/../outside.json",
        "/%2e%2e/outside.json",
        "/graphs/../manifest.json",
        "//etc/passwd",
        "/graphs",
        "/graphs/",
        "/nothing",
        "/page/.secret",
        "/page/../lm/manifest.json",
        "/page/%2e%2e/outside.json",
        "/page/link.json",
        "/page/",
        "/page",
        "/page/%00",
        "/" + "x" * 5000,
    ):
        assert ask(server, path)[0] == 404, path
    (packages / "lm" / "notes.md").unlink()
    status, headers, data = ask(server, "/page/app.mjs")
    assert (status, data) == (200, b"export {}")
    assert headers["content-type"].startswith("text/javascript")
    assert ask(server, "/page/ort.wasm")[1]["content-type"] == "application/wasm"
    (packages / "page" / "new.tmp").write_text("changed")
    (packages / "page" / "new.tmp").rename(packages / "page" / "app.mjs")
    status, headers, data = ask(server, "/page/app.mjs", If_None_Match=headers["etag"])
    assert (status, data) == (200, b"changed")
    assert json.loads(ask(server, "/")[2])["manifest"] == "manifest.json"


def test_other_methods_and_nonsense(start: Start) -> None:
    server = start()
    for method in ("POST", "PUT", "DELETE"):
        assert ask(server, "/manifest.json", method)[0] == 501
    for line in (b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"):
        with socket.create_connection(server.server_address[:2], timeout=20) as raw:
            raw.sendall(line)
            raw.recv(4096)
    assert ask(server, "/manifest.json")[0] == 200


def test_a_file_changed_under_the_server(packages: Path, start: Start, tmp_path: Path) -> None:
    server = start()
    path = packages / "lm" / "graphs" / "resident.safetensors"
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-10])
        status, _, body = ask(server, "/graphs/resident.safetensors")
        assert status == 500
        assert b"changed" in body
    finally:
        path.write_bytes(data)


def test_addresses_and_mounts_that_cannot_be(packages: Path, start: Start) -> None:
    taken = start().server_address[1]
    with open_package(packages / "lm") as package:
        for port in (taken, 70_000):
            with pytest.raises(LocationError, match=str(port)):
                PackageServer(package, port=port)
        with pytest.raises(InputError, match="graphs"):
            PackageServer(package, port=0, mounts={"graphs": packages})
        with pytest.raises(EvermindPackError):
            PackageServer(package, port=0, mounts={"x": packages / "nowhere"})


def test_the_runtime_runs_what_is_served(
    packages: Path, start: Start, options: RemoteOptions
) -> None:
    with em.load(packages / "lm") as model:
        expected = [piece.token for piece in model.generate([1, 2], max_new_tokens=6)]
    for at, name in enumerate(("lm", "lm.zip")):
        server = start(name)
        with em.load(server.url, remote=quick(options.cache_folder / str(at))) as model:
            assert [piece.token for piece in model.generate([1, 2], max_new_tokens=6)] == expected


def test_a_mirror(packages: Path, start: Start, options: RemoteOptions) -> None:
    origin = start("lm.zip")
    mirrored = quick(options.cache_folder)
    with (
        open_location(origin.url, mirrored) as package,
        PackageServer(package, port=0) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        path = next(path for path in package.manifest.files if path.endswith(".moe0p"))
        entry = package.manifest.files[path]
        data = ask(server, f"/{path}")[2]
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        server.shutdown()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_command(packages: Path, end: signal.Signals) -> None:
    command = [sys.executable, "-m", "evermind_pack", "serve", str(packages / "lm")]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
    connection.request("GET", "/manifest.json")
    assert connection.getresponse().status == 200
    process.send_signal(end)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
