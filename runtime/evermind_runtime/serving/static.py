"""A package as a static origin: only what its manifest names, with what browsers ask for.

Standard library only: the files are few and known, the answers simple, and nothing but their
names comes from the client. Every file has its sha256 as ETag; `?sha256=<digest>` makes an
address that never changes its content, so caches may keep it for ever.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from evermind_manifests.errors import EvermindPackError, InputError, LocationError
from evermind_manifests.manifest import MANIFEST_NAME, SIGNATURE_NAME
from evermind_manifests.package import Package
from evermind_manifests.store import DirectoryStore, Store

from ..stores.media import media_type
from .ranges import ByteRange, UnsatisfiableError, parse_ranges

_BLOCK: Final = 256 * 1024
_MAX_CONNECTIONS: Final = 128
_IDLE_SECONDS = 30.0
_MAX_SIGNATURE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """`cors` is the origin that may read (`*`: all, None: none but the server's own pages).

    `isolate` sends the two headers (COOP, COEP) that give a page threads and shared memory.
    `log` is called with a line per request.
    """

    cors: str | None = "*"
    isolate: bool = False
    log: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """One file that can be asked for."""

    store: Store
    path: str
    size: int
    etag: str
    digest: str | None = None
    #: Whether the store is closed once the file was sent.
    owned: bool = False


class PackageServer(ThreadingHTTPServer):
    """Serves one package at `/`, and folders of this machine below `mounts` names.

    Close it with `server_close`; the package stays the caller's.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        package: Package,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        mounts: Mapping[str, str | os.PathLike[str]] | None = None,
        options: Options | None = None,
    ) -> None:
        """Listens at once; call `serve_forever`. `port` 0 takes a free one.

        Raises `LocationError` if the address cannot be had or a mount is no folder,
        `InputError` for a mount whose name is a file's of the package.
        """
        self.options = options or Options()
        self.package = package
        self.requests = 0
        self.bytes_sent = 0
        self._files = _package_files(package)
        self._mounts = dict(mounts or {})
        self._count = threading.Lock()
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        tops = {path.partition("/")[0] for path in self._files}
        for name, folder in self._mounts.items():
            if not name or "/" in name or name in tops:
                raise InputError(f"mount {name!r}: expected a name no file of the package has")
            DirectoryStore(folder).close()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LocationError(f"{host}:{port}: cannot listen there: {reason}") from error

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{shown}:{port}/"

    def find(self, path: str) -> Served | None:
        """The file at a path without its leading slash."""
        if path in self._files:
            return self._files[path]
        name, _, rest = path.partition("/")
        folder = self._mounts.get(name)
        return _mounted(folder, rest) if folder is not None and rest else None

    def count(self, sent: int) -> None:
        """Add a request to the counters."""
        with self._count:
            self.requests += 1
            self.bytes_sent += sent

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread each, and no more of them than can do good."""
        self._slots.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """See `process_request`."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave when they like; that is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: PackageServer
    protocol_version = "HTTP/1.1"
    server_version = "evermind-pack"
    sys_version = ""
    timeout = _IDLE_SECONDS
    # Head and body in one segment where they fit.
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_OPTIONS(self) -> None:
        extra = {
            "Allow": "GET, HEAD, OPTIONS",
            "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
            "Access-Control-Allow-Headers": "Range, If-Range, If-None-Match, Cache-Control",
            "Access-Control-Max-Age": "86400",
        }
        self._head(204, extra)

    def _answer(self, *, body: bool) -> None:
        # A body nobody reads would be taken for the next request.
        if self.headers.get("Transfer-Encoding") or self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True
        parts = urlsplit(self.path)
        path = unquote(parts.path).lstrip("/")
        wanted = dict(parse_qsl(parts.query)).get("sha256")
        if not path:
            self._say(200, self._about(), body=body)
            return
        try:
            file = self.server.find(path)
        except EvermindPackError:
            file = None
        if file is None or (wanted is not None and wanted != file.digest):
            self._say(404, {"error": "not a file of this package"}, body=body)
            return
        try:
            self._serve(file, immutable=wanted is not None, body=body)
        finally:
            if file.owned:
                file.store.close()

    def _serve(self, file: Served, *, immutable: bool, body: bool) -> None:
        cache = "public, max-age=31536000, immutable" if immutable else "no-cache"
        headers = {"ETag": file.etag, "Cache-Control": cache, "Accept-Ranges": "bytes"}
        if file.owned:
            # A mounted page may keep itself and what lies in other mounts for offline use.
            headers["Service-Worker-Allowed"] = "/"
        if _matches(self.headers.get("If-None-Match"), file.etag):
            self._head(304, headers, length=None)
            return
        asked = self.headers.get("Range")
        if self.headers.get("If-Range", file.etag) != file.etag:
            asked = None
        try:
            ranges = parse_ranges(asked, file.size)
        except UnsatisfiableError:
            self._head(416, headers | {"Content-Range": f"bytes */{file.size}"})
            return
        try:
            if file.store.size(file.path) != file.size:
                raise LocationError("changed since the server was started")
        except EvermindPackError as error:
            self._say(500, {"error": f"{file.path}: {error}"}, body=body)
            return
        self._send(file, ranges, headers, body=body)

    def _send(
        self, file: Served, ranges: list[ByteRange] | None, headers: dict[str, str], *, body: bool
    ) -> None:
        kind = media_type(file.path)
        status, pieces = 206, ranges or []
        heads: list[bytes] = [b""]
        tail = b""
        if ranges is None:
            status, pieces = 200, [ByteRange(0, file.size)]
        elif len(ranges) == 1:
            headers["Content-Range"] = _content_range(ranges[0], file.size)
        else:
            boundary = secrets.token_hex(12)
            heads = [
                f"\r\n--{boundary}\r\nContent-Type: {kind}\r\n"
                f"Content-Range: {_content_range(one, file.size)}\r\n\r\n".encode()
                for one in ranges
            ]
            tail = f"\r\n--{boundary}--\r\n".encode()
            kind = f"multipart/byteranges; boundary={boundary}"
        length = sum(map(len, pieces)) + sum(map(len, heads)) + len(tail)
        self._head(status, headers | {"Content-Type": kind}, length=length)
        if not body:
            return
        try:
            for head, piece in zip(heads, pieces, strict=True):
                self.wfile.write(head)
                for block in _blocks(file, piece):
                    self.wfile.write(block)
            self.wfile.write(tail)
        except (EvermindPackError, OSError):
            # The head is sent: a body that is too short is all that can be said.
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _say(self, status: int, value: dict[str, object], *, body: bool) -> None:
        data = json.dumps(value).encode() + b"\n"
        extra = {"Content-Type": "application/json", "Cache-Control": "no-cache"}
        self._head(status, extra, length=len(data))
        if body:
            self.wfile.write(data)

    def _head(self, status: int, headers: Mapping[str, str], length: int | None = 0) -> None:
        options = self.server.options
        self.server.count(length or 0)
        self.send_response(status)
        if length is not None and status != 204:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("X-Content-Type-Options", "nosniff")
        if options.cors is not None:
            self.send_header("Access-Control-Allow-Origin", options.cors)
            exposed = "Content-Length, Content-Range, ETag, Accept-Ranges"
            self.send_header("Access-Control-Expose-Headers", exposed)
            # A page that is isolated itself may load only what says so.
            self.send_header("Cross-Origin-Resource-Policy", "cross-origin")
            if options.cors != "*":
                self.send_header("Vary", "Origin")
        if options.isolate:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        if options.log is not None:
            asked = self.headers.get("Range", "")
            options.log(f"{self.command} {self.path[:200]!r} {asked[:60]} {status} {length or 0:,}")

    def _about(self) -> dict[str, object]:
        package = self.server.package
        name, digest = package.manifest.name, package.digest
        return {"package": name, "digest": digest, "manifest": MANIFEST_NAME}

    def log_message(self, *args: object) -> None:
        """See `Options.log`."""


def _package_files(package: Package) -> dict[str, Served]:
    store = package.store
    files = {
        path: Served(store, path, entry.bytes, f'"{entry.sha256}"', entry.sha256)
        for path, entry in package.manifest.files.items()
    }
    size = store.size(MANIFEST_NAME)
    files[MANIFEST_NAME] = Served(store, MANIFEST_NAME, size, f'"{package.digest}"', package.digest)
    with suppress(EvermindPackError):
        data = store.read(SIGNATURE_NAME, limit=_MAX_SIGNATURE_BYTES)
        digest = hashlib.sha256(data).hexdigest()
        files[SIGNATURE_NAME] = Served(store, SIGNATURE_NAME, len(data), f'"{digest}"', digest)
    return files


def _mounted(folder: str | os.PathLike[str], path: str) -> Served | None:
    """A file below a mounted folder, as it is now; hidden ones are not there."""
    if any(part.startswith(".") for part in path.split("/")):
        return None
    # A store of its own: it keeps files open, and these may be replaced while we serve.
    store = DirectoryStore(folder)
    try:
        fd = store.open_file(path)
    except BaseException:
        store.close()
        raise
    info = os.fstat(fd)
    os.close(fd)
    etag = f'"{info.st_mtime_ns:x}-{info.st_size:x}"'
    return Served(store, path, info.st_size, etag, owned=True)


def _blocks(file: Served, piece: ByteRange) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_BLOCK, len(piece))))
    at = piece.begin
    while at < piece.end:
        view = buffer[: piece.end - at]
        file.store.read_into(file.path, at, view)
        yield view
        at += len(view)


def _matches(header: str | None, etag: str) -> bool:
    """If-None-Match: weak comparison, as the RFC has it for GET."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def _content_range(piece: ByteRange, size: int) -> str:
    return f"bytes {piece.begin}-{piece.end - 1}/{size}"
