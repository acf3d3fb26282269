"""One round in a process of its own: `python -m evermind_pack.benching.round`.

A fresh process has a thread pool, a memory arena and a peak of memory that nothing else has
touched. The job comes as one line on stdin, which stays open: when it ends, whoever asked is
gone, and so is this process. The answer is one line on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from evermind_manifests.errors import EvermindPackError
from evermind_manifests.manifest import Plan
from evermind_runtime import Model, PagingWarning, load
from evermind_runtime.devices import numpy_dtype
from evermind_runtime.machine import drop_pages, file_extents
from evermind_runtime.openers import open_location
from evermind_runtime.sizes import generates

from .job import Failure, Job, Round, to_line


def main() -> int:
    """Read a job, run it, write the answer."""
    job = msgspec.convert(json.loads(sys.stdin.buffer.readline()), Job)
    threading.Thread(target=_leave_with_the_asker, daemon=True).start()
    try:
        answer: Round | Failure = run_round(job)
    except EvermindPackError as error:
        answer = Failure(type=type(error).__name__, message=error.message, hint=error.hint)
    sys.stdout.buffer.write(to_line(answer))
    sys.stdout.buffer.flush()
    return 0


def run_round(job: Job) -> Round:
    """Do what the job says in this process."""
    # Opened, a package's files would be mapped: what is mapped stays.
    dropped = _drop(job.package) if job.cold else None
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PagingWarning)
        model = load(job.package, budget=job.budget, **job.options)
    load_seconds = time.perf_counter() - started
    with model:
        first_seconds = _measure(model, job, job.seed).ttft
        if job.cold:
            dropped = _drop(job.package) and dropped
        run = _measure(model, job, job.seed + 1)
        manifest, stats = model.manifest, model.stats()
        begin, end = run.begin, run.end
        return Round(
            load_seconds=load_seconds,
            first_seconds=first_seconds,
            ttft_seconds=run.ttft,
            decode_seconds=end.time - begin.time,
            cpu_seconds=end.processor - begin.processor,
            decoded=len(run.tokens) - 1,
            tokens=run.tokens,
            hits=end.hits - begin.hits,
            misses=end.misses - begin.misses,
            bytes_read=end.bytes_read - begin.bytes_read,
            disk_bytes=(None if end.disk is None or begin.disk is None else end.disk - begin.disk),
            peak_expert_bytes=stats.peak_resident_expert_bytes,
            resident_bytes=manifest.files[manifest.resident].bytes if manifest.resident else 0,
            rss_bytes=_peak_memory(),
            dropped=dropped,
            io=stats.io,
            plan=model.plan.name,
            threads=model.threads,
            warnings=[str(warning.message) for warning in caught],
        )


@dataclass(frozen=True, slots=True)
class _Mark:
    """Counters at one moment."""

    time: float
    processor: float
    hits: int
    misses: int
    bytes_read: int
    disk: int | None


@dataclass(frozen=True, slots=True)
class _Run:
    """One request: seconds to its first token, and the marks around all later ones."""

    ttft: float
    begin: _Mark
    end: _Mark
    tokens: list[int]


def _measure(model: Model, job: Job, seed: int) -> _Run:
    produce = _generated if generates(model.manifest) else _forwarded
    started = time.perf_counter()
    stream = produce(model, job, seed)
    tokens = [next(stream)]
    ttft = time.perf_counter() - started
    begin = _mark(model)
    tokens += stream
    return _Run(ttft, begin, _mark(model), tokens)


def _generated(model: Model, job: Job, seed: int) -> Iterator[int]:
    """Tokens continuing the prompt; nothing stops them but their number."""
    assert job.prompt is not None, "a package that generates is given a prompt"
    for piece in model.generate(
        job.prompt,
        max_new_tokens=job.max_new,
        temperature=job.temperature,
        seed=seed,
        stop_tokens=(),
    ):
        yield piece.token


def _forwarded(model: Model, job: Job, seed: int) -> Iterator[int]:
    """Random rows: all of the prompt's at once, then one by one. There are no tokens to tell."""
    plan = model.manifest.plan
    rng = np.random.default_rng(seed)
    state = model.new_state()
    model.forward(_random_inputs(plan, job.prompt_tokens, rng), state=state)
    yield 0
    for _ in range(job.max_new - 1):
        model.forward(_random_inputs(plan, 1, rng), state=state, steps="decode")
        yield 0


def _random_inputs(plan: Plan, rows: int, rng: np.random.Generator) -> dict[str, Any]:
    """An array for every input that has no default."""
    arrays = {}
    for name, spec in plan.inputs.items():
        if spec.default is not None:
            continue
        shape = [rows if isinstance(dim, str) else dim for dim in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        if np.issubdtype(dtype, np.floating):
            arrays[name] = rng.standard_normal(shape).astype(dtype)
        else:
            arrays[name] = rng.integers(0, spec.limit or 2, shape).astype(dtype)
    return arrays


def _mark(model: Model) -> _Mark:
    stats = model.stats()
    return _Mark(
        time=time.perf_counter(),
        processor=time.process_time(),
        hits=stats.expert_hits,
        misses=stats.expert_misses,
        bytes_read=stats.bytes_read,
        disk=_number("/proc/self/io", "read_bytes:"),
    )


def _drop(location: str) -> bool:
    with open_location(location) as package:
        extents = file_extents(package)
        return bool(extents) and drop_pages(extents)


def _peak_memory() -> int | None:
    kibibytes = _number("/proc/self/status", "VmHWM:")
    return None if kibibytes is None else kibibytes * 1024


def _number(path: str, field: str) -> int | None:
    """The number behind `field` in a file of /proc; `None` where there is none."""
    try:
        words = Path(path).read_text().split()
        return int(words[words.index(field) + 1])
    except (OSError, ValueError, IndexError):
        return None


def _leave_with_the_asker() -> None:
    # Not through sys.stdin: its lock must be free when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
