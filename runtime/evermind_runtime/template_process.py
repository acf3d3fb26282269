"""Rendering a chat template in a process of its own: see `template_worker.py` for why and how."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evermind_manifests.errors import InputError, MissingExtraError, TemplateError

# What starts a process is imported when one is: it would take 4 MB of every process.
if TYPE_CHECKING:
    import subprocess

# Older versions let templates out of the sandbox.
_LEAST_JINJA = (3, 1, 6)
_MAX_REQUEST_BYTES = 64 * 1024 * 1024
# The longest answer: every character of the longest text escaped, and the frame around it.
_MAX_ANSWER_BYTES = 12 * 4 * 1024 * 1024 + 1024
_WORKER = Path(__file__).with_name("template_worker.py")


class TemplateProcess:
    """Renders templates; the process begins with the first and lasts until `close`.

    Safe to call from several threads, one of which is served at a time.
    """

    def __init__(self, seconds: int = 5) -> None:
        """`seconds` of processor time are what one text may take."""
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """What `template` makes of `values`, which JSON can hold.

        Raises `InputError` for messages that the template itself refuses or that are no JSON,
        `TemplateError` for a template that fails or takes too much, and `MissingExtraError`
        without a Jinja that is safe.
        """
        try:
            request = json.dumps({"template": template, "values": values}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"messages: not what JSON can hold: {error}") from error
        if len(request) > _MAX_REQUEST_BYTES:
            raise InputError(
                f"messages: expected at most {_MAX_REQUEST_BYTES:,} bytes, found {len(request):,}"
            )
        with self._lock:
            found = self._ask(request)
        if "refused" in found:
            raise InputError(f"messages: the chat template refuses them: {found['refused']}")
        if isinstance(text := found.get("text"), str):
            return text
        reason = found.get("failed") or found.get("exhausted")
        raise TemplateError(f"the chat template failed: {reason}")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process is None:
            self._process = _start(self._seconds)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(struct.pack("<I", len(request)) + request)
            process.stdin.flush()
            head = process.stdout.read(4)
            (length,) = struct.unpack("<I", head) if len(head) == 4 else (0,)
            data = process.stdout.read(length) if length <= _MAX_ANSWER_BYTES else b""
            found = json.loads(data) if data and len(data) == length else None
        except BrokenPipeError:
            found = None
        except BaseException:
            # Whatever stopped us (Ctrl-C), the next answer would be this request's.
            self._end()
            raise
        if not isinstance(found, dict):
            return {"failed": self._cause(self._end())}
        if "exhausted" in found:
            self._end()
        return found

    def _cause(self, code: int) -> str:
        if code == -signal.SIGXCPU:
            return f"it takes more than {self._seconds} seconds of processor time"
        return f"the process that rendered it ended ({code})"

    def _end(self) -> int:
        """Kill the process, if there is one; gives how it ended."""
        process, self._process = self._process, None
        if process is None:
            return 0
        import subprocess

        # One that ends by itself is given the time to say how.
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            return process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _start(seconds: int) -> subprocess.Popen[bytes]:
    import subprocess
    from importlib import metadata, util

    if util.find_spec("jinja2") is None:
        raise MissingExtraError("jinja2", "text", "Rendering a chat template")
    if util.find_spec("resource") is None:
        raise TemplateError(
            "chat templates are not rendered on this system, which cannot bound what they take",
            hint="Render the messages elsewhere and pass the text as a prompt.",
        )
    found = metadata.version("jinja2")
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < _LEAST_JINJA:
        least = ".".join(map(str, _LEAST_JINJA))
        raise TemplateError(
            f"Rendering a chat template needs jinja2 {least} or later, found {found}: earlier ones "
            "let templates out of the sandbox",
            hint="Install it with: pip install -U 'evermind-pack[text]'",
        )
    # -P keeps this folder's modules, which are called like some of Python's, off the path. In a
    # session of its own it does not hear of Ctrl-C.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"}
    environment |= {name: os.environ[name] for name in ("TZ", "LC_TIME") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", str(_WORKER), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
