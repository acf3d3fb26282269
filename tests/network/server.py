"""A web server on 127.0.0.1 that misbehaves as told: faults, throttling, other answers.

Faults are drawn from (seed, path, how often it was asked), so that a run's faults do not
depend on the order in which threads ask.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from evermind_runtime.stores.media import media_type

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Behaviour:
    """What the server does beyond the plain: change it while it runs."""

    ranges: bool = True
    lengths: bool = True
    faults: float = 0.0
    kinds: tuple[str, ...] = ("short", "reset", "wrong-range", "busy")
    seed: int = 0
    #: Bytes a second over all connections; None is as fast as it goes.
    rate: float | None = None
    latency: float = 0.0
    #: path → bytes to serve instead of the file's.
    replaced: dict[str, bytes] = field(default_factory=dict)
    #: Called with (handler, path) first; True if it has answered.
    hook: Callable[[Handler, str], bool] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    writable: bool = False


class Server(ThreadingHTTPServer):
    """Serves `root`; `requests`, `sent` (body bytes) and `log` say what was asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path, behaviour: Behaviour | None = None) -> None:
        self.root = root
        self.behaviour = behaviour or Behaviour()
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.log: list[tuple[str, str, str | None]] = []
        self.authorizations: list[str | None] = []
        self.faults: Counter[str] = Counter()
        self.guard = threading.Lock()
        self._contents: dict[Path, tuple[tuple[int, int, int], bytes]] = {}
        self._next_free = time.monotonic()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    @property
    def total_sent(self) -> int:
        return sum(self.sent.values())

    def forget(self) -> None:
        self.requests.clear()
        self.sent.clear()
        self.log.clear()

    def content(self, file: Path) -> bytes:
        """A file's bytes, read once as long as it is the same."""
        info = file.stat()
        key = info.st_ino, info.st_mtime_ns, info.st_size
        known = self._contents.get(file)
        if known is None or known[0] != key:
            known = self._contents[file] = key, file.read_bytes()
        return known[1]

    def throttle(self, count: int) -> None:
        """Wait as long as `count` bytes take on a line shared by all connections."""
        rate = self.behaviour.rate
        if rate is None:
            return
        with self.guard:
            start = max(self._next_free, time.monotonic())
            self._next_free = start + count / rate
        time.sleep(max(0.0, start + count / rate - time.monotonic()))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.serve(body=True)

    def do_HEAD(self) -> None:
        self.serve(body=False)

    def do_PUT(self) -> None:
        server = self.server
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        self.note(path)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not server.behaviour.writable:
            self.answer(405, b"")
            return
        if server.behaviour.hook and server.behaviour.hook(self, path):
            return
        target = server.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        self.answer(201, b"", ETag=self.tag(data))

    def serve(self, *, body: bool) -> None:
        server, how = self.server, self.server.behaviour
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        time.sleep(how.latency)
        self.note(path)
        if how.hook and how.hook(self, path):
            return
        file = server.root / path
        if path in how.replaced:
            data = how.replaced[path]
        elif file.is_file():
            data = server.content(file)
        else:
            self.answer(404, b"", body=body)
            return
        fault = self.draw(path) if body else None
        if fault == "busy":
            self.answer(503, b"")
            return
        status, begin, end = 200, 0, len(data)
        extra = {"ETag": self.tag(data), "Content-Type": media_type(path), **how.headers}
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match and how.ranges:
            begin = int(match[1])
            end = min(len(data), int(match[2]) + 1) if match[2] else len(data)
            if begin >= len(data):
                self.answer(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
                return
            status = 206
            shown = begin + 1 if fault == "wrong-range" else begin
            extra["Content-Range"] = f"bytes {shown}-{end - 1}/{len(data)}"
        self.send_response(status)
        if how.lengths:
            self.send_header("Content-Length", str(end - begin))
        else:
            self.close_connection = True
        for name, value in extra.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            cut = None
            if fault in ("short", "reset"):
                cut = begin + random.Random(f"{how.seed}{path}").randrange(end - begin + 1)
            self.send_body(path, data[begin : end if cut is None else cut])
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            if cut is not None:
                self.close_connection = True

    def send_body(self, path: str, data: bytes) -> None:
        for at in range(0, len(data), 16 * 1024):
            block = data[at : at + 16 * 1024]
            self.server.throttle(len(block))
            try:
                self.wfile.write(block)
            except OSError:
                self.close_connection = True
                return
            with self.server.guard:
                self.server.sent[path] += len(block)

    def answer(self, status: int, data: bytes, *, body: bool = True, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def note(self, path: str) -> None:
        with self.server.guard:
            self.server.requests[path] += 1
            self.server.log.append((self.command, path, self.headers.get("Range")))
            self.server.authorizations.append(self.headers.get("Authorization"))

    def draw(self, path: str) -> str | None:
        how = self.server.behaviour
        rng = random.Random(f"{how.seed} {path} {self.server.requests[path]}")
        if rng.random() >= how.faults:
            return None
        kind = rng.choice(how.kinds)
        with self.server.guard:
            self.server.faults[kind] += 1
        return kind

    @staticmethod
    def tag(data: bytes) -> str:
        return f'"{_digest(data)}"'

    def log_message(self, *args: object) -> None:
        """Quiet."""


@functools.lru_cache(256)
def _digest(data: bytes) -> str:
    # A bytes object remembers its hash, so a file served often is not hashed again.
    return hashlib.sha256(data).hexdigest()[:16]


@contextlib.contextmanager
def serving(root: Path, behaviour: Behaviour | None = None) -> Iterator[Server]:
    server = Server(root, behaviour)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def tree_digest(root: Path) -> dict[str, str]:
    """path → sha256 of every file below a folder."""
    return {
        os.path.relpath(path, root): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
