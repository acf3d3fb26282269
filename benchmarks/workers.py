"""A side of a comparison in a process of its own, which waits while others are asked.

So each side has its own libraries, threads and peak of memory, and rounds can still take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from .common import ROOT, environment


class Worker:
    """A process with one object, made by calling `module.name(**arguments)`; use it in a `with`.

    Calling the worker calls a method of that object; arguments and results travel as JSON. `begun`
    hears the process's id before the object is made.
    """

    def __init__(
        self,
        target: str,
        *,
        threads: int,
        begun: Callable[[int], None] | None = None,
        **arguments: Any,
    ) -> None:
        arguments["threads"] = threads
        # What a peer says on its error stream goes with ours only if it fails.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", target, json.dumps(arguments)],
            cwd=ROOT,
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.process = self._process.pid
        if begun:
            begun(self.process)
        self._answer()

    def __call__(self, method: str, **arguments: Any) -> Any:
        """What the method returned. Raises `RuntimeError` with what the other process raised."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer tells that it has ended
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _serve(target: str, arguments: dict[str, Any]) -> None:
    import importlib
    import traceback

    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        module, _, name = target.rpartition(".")
        subject = getattr(importlib.import_module(module), name)(**arguments)
        answer(result=None)
        for line in sys.stdin:
            method, given = json.loads(line)
            answer(result=getattr(subject, method)(**given))
    except Exception:
        answer(error=traceback.format_exc())


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
