"""A model hub on this machine: as much of its HTTP interface as `huggingface_hub` uses to fetch."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"


class Hub:
    """Models by name; each has revisions by name, and each of them a folder."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.endpoint = ""

    def add(self, model: str, **revisions: Path) -> None:
        self.models[model] = revisions

    @property
    def fetched(self) -> list[str]:
        """The files whose content was sent, in order of their names."""
        return sorted(
            path.split("/resolve/", 1)[1].split("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        )

    def commit(self, model: str, revision: str) -> str | None:
        for name in self.models[model]:
            commit = hashlib.sha1(f"{model} {name}".encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def folder(self, model: str, commit: str) -> Path:
        name = next(one for one in self.models[model] if self.commit(model, one) == commit)
        return self.models[model][name]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that is reached at its `endpoint`."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"{}")

    def _allowed(self, model: str) -> bool:
        self.hub.tokens.add(self.headers.get("Authorization"))
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if model not in self.hub.models:
            # As the real one: who is not logged in is not told what there is.
            if authorized:
                self._error(404, "RepoNotFound", "Repository not found")
            else:
                self._error(401, "", "Invalid username or password.")
            return False
        if model in self.hub.broken:
            self._error(500, "", "Internal error")
            return False
        if model in self.hub.gated and not authorized:
            self._error(401, "GatedRepo", f"Access to model {model} is restricted.")
            return False
        return True

    def _api(self, model: str, rest: list[str]) -> None:
        if not self._allowed(model):
            return
        kind, revision = rest[0], "/".join(rest[1:])
        commit = self.hub.commit(model, revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        folder = self.hub.folder(model, commit)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if kind == "revision":
            body: Any = {
                "id": model,
                "sha": commit,
                "siblings": [{"rfilename": name} for name in names],
            }
        else:
            body = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}
                for name, path in zip(names, files, strict=True)
            ]
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, model: str, commit: str, name: str) -> None:
        if not self._allowed(model):
            return
        path = self.hub.folder(model, commit) / name
        if not path.is_file():
            self._error(404, "EntryNotFound", "Entry not found")
            return
        self._send(200, path.read_bytes(), {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": commit})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
