"""ONNX Runtime, imported when first needed: two builds exist and the user chooses one.

Also what all sessions of a process share. One thread pool: sessions with spinning pools of
their own fight over the cores (measured: 5 to 13 times slower with ten sessions). One memory
arena: with an arena each, eleven sessions held 28 MB more after the same work.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from evermind_manifests.errors import DeviceError, MissingExtraError

from .choose_threads import check_threads

_ERRORS_ONLY = 3
_DOUBLE = 0
# What the arena takes at first, and doubles when it is full. Only what is touched is memory.
_ARENA_BYTES = 16 << 20

_pool_lock = threading.Lock()
_pool_threads: int | None = None
# Who has a thread of the pool for itself. A forked process has none of the threads.
_workers_lock = threading.Lock()
_workers_taken: weakref.WeakSet[object] = weakref.WeakSet()
_pool_process: int | None = None


def require() -> Any:
    """The `onnxruntime` module, or `MissingExtraError` naming the extra to install."""
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise MissingExtraError("onnxruntime", "cpu", "Running a package") from error
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None  # its binary part turns Ctrl-C into this
        raise DeviceError(
            f"the installed onnxruntime cannot be imported: {error}",
            hint="Install it again: pip install --force-reinstall onnxruntime",
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # Both wheels unpack into one folder; removing either leaves an empty shell.
        raise DeviceError(
            "the installed onnxruntime is incomplete",
            hint="onnxruntime and onnxruntime-gpu exclude each other: uninstall both, then "
            "install 'evermind-pack[cpu]' or 'evermind-pack[cuda]'.",
        )
    return onnxruntime


def start(threads: int | None = None, suited: Callable[[int], int] = int) -> int:
    """Set up what sessions share (once); returns the pool's size.

    By default that is what is `suited` to so many usable cores, all of them. Raises
    `DeviceError` when it already runs with another size than the one asked for.
    """
    global _pool_threads, _pool_process
    cores = usable_cores()
    check_threads(threads, cores)
    require()
    with _pool_lock:
        if _pool_threads is None:
            size = threads or suited(cores)
            try:
                _share(size)
            except Exception as error:
                raise DeviceError(
                    f"ONNX Runtime's shared thread pool cannot be set up: {error}",
                    hint="Load the first package before this process creates an ONNX Runtime "
                    "session of its own.",
                ) from error
            _pool_threads, _pool_process = size, os.getpid()
        elif threads not in (None, _pool_threads):
            raise DeviceError(
                f"threads={threads} was asked for, but this process's pool already runs with "
                f"{_pool_threads}",
                hint="The pool is shared by all packages of a process: pass `threads` to the "
                "first load only.",
            )
        return _pool_threads


def take_worker(taker: object) -> bool:
    """Whether one of the pool's threads is free for `taker`'s `run_async`; the caller is none.

    It is taken until `return_worker`, or until nothing refers to `taker`.
    """
    with _workers_lock:
        threads = _pool_threads if _pool_process == os.getpid() else None
        free = threads is not None and len(_workers_taken) < threads - 1
        if free:
            _workers_taken.add(taker)
        return free


def return_worker(taker: object) -> None:
    """`taker`'s thread is free again. Does nothing if it has none."""
    with _workers_lock:
        _workers_taken.discard(taker)


def usable_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0))


def session_options() -> Any:
    """Options for a session that uses the shared pool and arena; call `start` first."""
    options = require().SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = _ERRORS_ONLY
    return options


def _share(threads: int) -> None:
    ort = require()
    ort.set_global_thread_pool_sizes(threads, 1)
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    # Not chunk by chunk as they are asked for: freed ones of different sizes never merge.
    config = ort.OrtArenaCfg(
        {"arena_extend_strategy": _DOUBLE, "initial_chunk_size_bytes": _ARENA_BYTES}
    )
    ort.create_and_register_allocator(memory, config)
