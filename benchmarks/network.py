"""Time and bytes to the first token over a network, against downloading the package first.

The server is on this machine; a line of a given rate, shared by all connections, and a
round trip of 20 ms for every request are made by waiting.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import evermind_runtime as em
from evermind_runtime.openers import open_location
from evermind_runtime.stores import RemoteOptions
from evermind_runtime.stores.warm_up import files_of_every_run
from evermind_runtime.transfer import copy_package, open_target

from tests.network.server import Behaviour, Server, serving

from .common import MIB, Cell, Report, Table, Target, median, run
from .models import language_model, package

PROMPT = [1, 2, 3, 4]
ROUND_TRIP = 0.02
RATES = (20, 100, 1000)
SPARE = 0.05


def measure(quick: bool) -> Report:
    layers, experts = (2, 8) if quick else (6, 32)
    rates = (1000,) if quick else RATES
    source = language_model(
        vocab=1024, width=192, layers=layers, experts=experts, top_k=2, hidden=512
    )
    rows: list[list[Cell]] = []
    met, found = True, []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        package(source, root / "origin" / "files")
        package(source, root / "origin" / "pool.zip", layout="pool")
        allowed = _needed(root)  # imports and starts the thread pool, too
        for rate in rates:
            sides = _round(root, rate, rounds=1 if quick or rate < 100 else 3)
            whole = sides["download, then run"][0]
            for side, (seconds, sent) in sides.items():
                rows.append([f"{rate} Mbit/s, {side}", seconds, sent / MIB, whole / seconds])
            sent = sides["empty cache, files"][1]
            met &= sent <= allowed * (1 + SPARE)
            found.append(f"{sent / allowed - 1:+.1%}")
    title = (
        f"First token of a prompt of {len(PROMPT)}, {layers} layers of {experts} experts, top-2, "
        f"f16; round trip {ROUND_TRIP * 1000:.0f} ms"
    )
    columns = ["", "seconds", "MiB over the line", "times as fast as download first"]
    wanted = f"at most {SPARE:+.0%}"
    target = Target("bytes beyond resident part and routed experts", wanted, ", ".join(found), met)
    return Report([Table(title, columns, rows)], [target])


def _round(root: Path, rate: int, *, rounds: int) -> dict[str, tuple[float, float]]:
    """Each side's (median seconds, bytes sent) at `rate` Mbit/s."""
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        with _line(root / "origin", rate) as server, tempfile.TemporaryDirectory(dir=root) as place:
            sides = {
                "empty cache, files": ("files/", "a"),
                "empty cache, pool in a zip": ("pool.zip", "b"),
                "second run": ("files/", "a"),
            }
            for side, (path, cache) in sides.items():
                options = RemoteOptions(cache_folder=Path(place, cache), offline=False)
                times.setdefault(side, []).append(
                    _timed(server, lambda p=path, o=options: first_token(server.url + p, o))
                )
            options = RemoteOptions(cache_folder=Path(place, "c"), offline=False)
            times.setdefault("download, then run", []).append(
                _timed(server, lambda o=options: _download(server, Path(place, "copy"), o))
            )
    return {
        side: (median([one[0] for one in found]), median([one[1] for one in found]))
        for side, found in times.items()
    }


def first_token(location: str, options: RemoteOptions) -> None:
    with em.load(location, remote=options) as model:
        next(iter(model.generate(PROMPT, max_new_tokens=1)))


def _download(server: Server, folder: Path, options: RemoteOptions) -> None:
    with open_location(server.url + "files/", options) as remote:
        copy_package(remote, open_target(str(folder), options), concurrency=options.concurrency)
    first_token(str(folder), options)


def _timed(server: Server, work: object) -> tuple[float, float]:
    assert callable(work)
    server.forget()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started, float(server.total_sent)


@contextmanager
def _line(root: Path, rate: int) -> Iterator[Server]:
    with serving(root, Behaviour(rate=rate * 1e6 / 8, latency=ROUND_TRIP)) as server:
        yield server


def _needed(root: Path) -> int:
    """Bytes of the resident part and of the experts that the first token needs."""
    folder = root / "origin" / "files"
    # Not in pools, for which all experts are read.
    with em.load(folder, plan="half") as model:
        next(iter(model.generate(PROMPT, max_new_tokens=1)))
        experts = model.stats().bytes_read
        manifest = model.manifest
    always = sum(manifest.files[path].bytes for path in files_of_every_run(manifest))
    return (folder / "manifest.json").stat().st_size + always + experts


if __name__ == "__main__":
    run(measure)
