"""Headless Chromium over its debugging pipe: pages with storage of their own, no driver needed."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--mute-audio",
    "--remote-debugging-pipe",
)
_TIMEOUT = 60.0


def find_chromium() -> str | None:
    """The browser's path, if there is one."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class PageError(Exception):
    """What a page threw; `name` is the error's class in JavaScript."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class Browser:
    """One process with a profile in a temporary folder; `restart` keeps the profile."""

    def __init__(self, *flags: str) -> None:
        self._flags = flags
        self._profile = tempfile.mkdtemp(prefix="evermind-chromium-")
        self._start()

    def page(self, url: str, *, context: str | None = None) -> Page:
        """A new page at `url`; in a `context` of `new_context`, else in the profile's own."""
        extra = {"browserContextId": context} if context else {}
        target = self.call("Target.createTarget", {"url": "about:blank", **extra})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        page = Page(self, target, session["sessionId"])
        page.call("Page.enable")
        page.call("Runtime.enable")
        page.go(url)
        return page

    def new_context(self) -> str:
        """Storage apart from everything else, gone with the browser."""
        return str(self.call("Target.createBrowserContext")["browserContextId"])

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        session: str | None = None,
        timeout: float = _TIMEOUT,
    ) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer."""
        answer: queue.Queue[dict[str, Any]] = queue.Queue()
        with self._lock:
            self._last += 1
            number = self._last
            self._waiting[number] = answer
            message = {"id": number, "method": method, "params": params or {}}
            if session:
                message["sessionId"] = session
            os.write(self._to, json.dumps(message).encode() + b"\0")
        try:
            found = answer.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"{method}: no answer in {timeout} s") from None
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        result: dict[str, Any] = found["result"]
        return result

    def restart(self) -> None:
        """End the process and begin a new one with the same profile."""
        self._stop()
        self._start()

    def close(self) -> None:
        self._stop()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        executable = find_chromium()
        assert executable, "tests without a browser are skipped"
        self._lock = threading.Lock()
        self._last = 0
        self._waiting: dict[int, queue.Queue[dict[str, Any]]] = {}
        theirs, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [executable, *_FLAGS, *self._flags, f"--user-data-dir={self._profile}"]
        # The browser reads commands from descriptor 3 and answers on 4.
        line = f'exec 3<&{theirs} 4>&{theirs_out}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "chromium", *command],
            pass_fds=(theirs, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs)
        os.close(theirs_out)
        threading.Thread(target=self._listen, args=(self._from,), daemon=True).start()

    def _stop(self) -> None:
        with suppress(Exception):
            self.call("Browser.close", timeout=5)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._to)

    def _listen(self, descriptor: int) -> None:
        rest = b""
        with os.fdopen(descriptor, "rb", buffering=0) as pipe:
            while block := pipe.read(1 << 20):
                *messages, rest = (rest + block).split(b"\0")
                for message in messages:
                    self._hear(json.loads(message))

    def _hear(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._waiting.pop(message["id"]).put(message)


class Page:
    """One page."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self.browser = browser
        self._target = target
        self._session = session

    def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.browser.call(method, params, self._session)

    def go(self, url: str) -> None:
        """Open `url` and wait until it is loaded."""
        self.call("Page.navigate", {"url": url})
        self.run(
            "await new Promise((r) => document.readyState === 'complete' ? r() "
            ": addEventListener('load', r))"
        )

    def run(self, code: str, **arguments: Any) -> Any:
        """What the body of an async function returns; `arguments` are its constants.

        Raises `PageError` for what it throws.
        """
        names = ", ".join(arguments)
        values = ", ".join(json.dumps(value) for value in arguments.values())
        body = f"(async () => {{ {code} }})()"
        wrapped = (
            f"(async ({names}) => {{ try {{ return {{ value: await {body} }}; }}"
            " catch (error) { return { name: error?.name ?? 'Error', "
            f"message: String(error?.message ?? error) }}; }} }})({values})"
        )
        found = self.call(
            "Runtime.evaluate",
            {"expression": wrapped, "awaitPromise": True, "returnByValue": True},
        )
        if "exceptionDetails" in found:
            raise PageError("SyntaxError", json.dumps(found["exceptionDetails"])[:2000])
        result = found["result"].get("value", {})
        if "name" in result:
            raise PageError(result["name"], result["message"])
        return result.get("value")

    def close(self) -> None:
        self.browser.call("Target.closeTarget", {"targetId": self._target})
