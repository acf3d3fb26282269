"""How fast this machine's processor reads memory, multiplies and hashes, with numpy and hashlib.

Every rate is the best of several passes: other work on the machine only makes one slower.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

_MOST_MEMORY = 256 * 2**20
_LEAST_MEMORY = 2**20
_HASH_BYTES = 4 * 2**20
# OpenBLAS multiplies matrices this small on the thread that asks for it, so that the threads
# are counted here and not by a library.
_SIDE = 64
_STACK = 64
_PASS_SECONDS = 0.03
_CALLS = 1000


def memory_rate(threads: int, size: int, *, seconds: float = 0.5) -> float:
    """Bytes per second that `threads` threads read together, from `size` bytes of memory.

    `size` is clamped to 1 to 256 MiB. What fits in a cache is read at the cache's rate.
    """
    each = min(max(size, _LEAST_MEMORY), _MOST_MEMORY) // threads // 8
    blocks = [np.full(each, number, np.uint64) for number in range(threads)]
    best = _best([functools.partial(np.bitwise_or.reduce, block) for block in blocks], seconds)
    return threads * each * 8 / best


def matmul_rate(threads: int, *, seconds: float = 0.5) -> float:
    """float32 operations per second of matrix products, one for each multiply and each add."""
    jobs = []
    for _ in range(threads):
        left = np.ones((_STACK, _SIDE, _SIDE), np.float32)
        right, out = left.copy(), left.copy()
        jobs.append(functools.partial(np.matmul, left, right, out=out))
    return threads * 2 * _STACK * _SIDE**3 / _best(jobs, seconds)


def sha256_rate(*, seconds: float = 0.2) -> float:
    """Bytes per second that one thread hashes."""
    data = bytes(_HASH_BYTES)
    return _HASH_BYTES / _best([lambda: hashlib.sha256(data)], seconds)


def call_seconds(*, seconds: float = 0.1) -> float:
    """Seconds of one small numpy call: how fast this machine runs what is not arithmetic."""
    values = np.zeros(8, np.float32)

    def calls() -> None:
        for _ in range(_CALLS):
            np.add(values, values, out=values)

    return _best([calls], seconds) / _CALLS


def _best(jobs: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Seconds that the jobs take side by side, once each on threads of their own, at best.

    A pass repeats them until it is long against the time it takes to wake a thread.
    """

    def repeated(job: Callable[[], Any]) -> tuple[float, float]:
        started = time.perf_counter()
        for _ in range(repeats):
            job()
        return started, time.perf_counter()

    repeats = 1
    deadline = time.perf_counter() + seconds
    best = float("inf")
    with ThreadPoolExecutor(len(jobs)) as pool:
        while best == float("inf") or time.perf_counter() < deadline:
            spans = list(pool.map(repeated, jobs))
            took = max(end for _, end in spans) - min(start for start, _ in spans)
            if took < _PASS_SECONDS / 2:
                repeats = 1 + int(repeats * _PASS_SECONDS / max(took, 1e-6))
            else:
                best = min(best, took / repeats)
    return best
