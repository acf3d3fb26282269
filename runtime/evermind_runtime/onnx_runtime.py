"""ONNX Runtime, imported when first needed: two builds exist and the user chooses one.

Also its one global thread pool. Sessions with spinning pools of their own fight over the
cores (measured: 5 to 13 times slower with ten sessions), so every session shares this one.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from evermind_manifests.errors import DeviceError, MissingExtraError

_pool_lock = threading.Lock()
_pool_threads: int | None = None


def require() -> Any:
    """The `onnxruntime` module, or `MissingExtraError` naming the extra to install."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "Running a package") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # Both wheels unpack into one folder; removing either leaves an empty shell.
        raise DeviceError(
            "the installed onnxruntime is incomplete",
            hint="onnxruntime and onnxruntime-gpu exclude each other: uninstall both, then "
            "install 'evermind-pack[cpu]' or 'evermind-pack[cuda]'.",
        )
    return onnxruntime


def start_thread_pool(threads: int | None = None) -> int:
    """Start the process's pool (once) and return its size; default: the usable cores.

    Raises `DeviceError` when it already runs with another size.
    """
    global _pool_threads
    with _pool_lock:
        if _pool_threads is None:
            size = threads or len(os.sched_getaffinity(0))
            try:
                require().set_global_thread_pool_sizes(size, 1)
            except Exception as error:
                raise DeviceError(
                    f"ONNX Runtime's global thread pool cannot be set up: {error}",
                    hint="Load the first package before this process creates an ONNX Runtime "
                    "session of its own.",
                ) from error
            _pool_threads = size
        elif threads not in (None, _pool_threads):
            raise DeviceError(
                f"threads={threads} was asked for, but this process's pool already runs with "
                f"{_pool_threads}",
                hint="The pool is shared by all packages of a process: pass `threads` to the "
                "first load only.",
            )
        return _pool_threads
