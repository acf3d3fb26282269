"""The peer as a child process: one JSON line in, one out."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
PACKAGE = FOLDER / "node_modules" / "@seanhogg" / "builderforce-memory-engine"


def missing() -> str | None:
    """Why the peer cannot be asked here; `None` if it can."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not PACKAGE.is_dir():
        return "the peer is not installed: run tests/interop/setup"
    return None


class Peer:
    """A running node process; use it in a `with`. `process` is its id."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["node", "--expose-gc", "peer.mjs"],
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.process = self._process.pid

    def __call__(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer to one request; bytes in it are sent as base64."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        encoded = {
            key: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for key, value in request.items()
        }
        with contextlib.suppress(BrokenPipeError):  # the answer tells that it has ended
            self._process.stdin.write(json.dumps({"op": op, **encoded}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"{op}: the peer ended with exit code {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, f"{op}: {answer['error']}"
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def decoded(text: str) -> bytes:
    return base64.b64decode(text)


def floats(text: str) -> np.ndarray:
    return np.frombuffer(decoded(text), "<f4")
