"""Copy a package: the files that are not there yet, and the manifest last.

A copy can be stopped at any point and begun again; what arrived is not sent twice. Until the
manifest is there, a new copy is no package; see docs/network.md for replacing one in place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from evermind_manifests.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from evermind_manifests.package import Package

from .source import Source
from .targets import Target


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did: files (and bytes) it sent, and those it found there."""

    sent: int
    sent_bytes: int
    kept: int


def copy_package(
    package: Package,
    target: Target,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    concurrency: int = 4,
) -> Copied:
    """Bring all files of `package` to `target`, `concurrency` at a time, and close the target.

    `progress(done, total)` counts bytes. Raises `DigestError` for a source that is damaged
    (nothing of that file is kept), and what the target raises.
    """
    try:
        return _copy(package, target, progress, concurrency)
    finally:
        target.close()


def _copy(
    package: Package, target: Target, progress: Callable[[int, int], None], concurrency: int
) -> Copied:
    files = package.manifest.files
    stop = threading.Event()
    source = Source(package, stop.is_set)
    data = package.store.read(MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
    target.prepare(package.manifest, package.digest)
    missing = [path for path in sorted(files) if not target.holds(path, files[path])]
    total = sum(files[path].bytes for path in missing)
    done = 0
    lock = threading.Lock()
    progress(0, total)

    def one(path: str) -> None:
        nonlocal done
        target.put(path, files[path], source)
        with lock:
            done += files[path].bytes
            progress(done, total)

    pool = ThreadPoolExecutor(concurrency, "evermind-copy")
    try:
        futures = [pool.submit(one, path) for path in missing]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    target.finish(data, source.signature())
    return Copied(len(missing), total, len(files) - len(missing))
