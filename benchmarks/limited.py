"""A language model that memory holds two fifths of: paging beside every peer, cold and warm."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np

from tests.interop.peer import missing

from .common import MIB, Cell, Report, Table, Target, fresh, median, ratio, run
from .memory_limit import HOW, UNHELD, Held, held
from .workers import Worker

THREADS = 2
DIMS = {"vocab": 1024, "width": 1024, "layers": 4, "experts": 32, "top_k": 2, "hidden": 1024}
QUICK_DIMS = {**DIMS, "width": 512, "layers": 2, "experts": 16, "hidden": 512}
# For what a process needs apart from experts, and beneath a balloon what others keep running.
BESIDES, QUICK_BESIDES = 192 * MIB, 48 * MIB
# The logits' largest difference, of the largest logit; the sides add up in different orders.
TOLERANCE = 1e-4
OURS, TRUSTING, HALF = (
    "evermind-pack f32, 25% of the experts",
    "the same, not verifying",
    "evermind-pack f16, the same budget",
)
#: What is said where there was no memory: by Python and numpy, C++, the system, node. Last, of a
#: process that ended without a word: all that are asked have run where memory was not limited.
NO_MEMORY = (
    "MemoryError",
    "bad_alloc",
    "Cannot allocate memory",
    "ENOMEM",
    "can't start new thread",
    "Resource temporarily unavailable",
    "allocation failed",
    "ended with exit code",
)
#: The rows of tokens: for the pass from a cold disk, one that nobody times, the pass after that.
COLD, BETWEEN, WARM = range(3)


@dataclass(frozen=True)
class Way:
    """One side: its class in `limited_sides`, what it is made with, and what it lacks here.

    `limited` is what it is made with besides where memory is limited.
    """

    name: str
    side: str
    arguments: Mapping[str, Any]
    limited: Mapping[str, Any] = field(default_factory=dict)
    #: It keeps all weights in memory of its own, which cannot be evicted.
    own: bool = False
    #: It decodes one of so many tokens that the others decode.
    fewer: int = 1
    lacks: str | None = None


@dataclass
class Found:
    """What one side gave, in tokens a second: without a limit, and in every round under it."""

    tokens: int
    free: float
    own: float
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    refused: bool = False


def measure(quick: bool) -> Report:
    tokens, rounds = (4, 1) if quick else (24, 3)
    with tempfile.TemporaryDirectory() as folder:
        files = fresh(make_files, folder=folder, dims=QUICK_DIMS if quick else DIMS)
        config, budget = files["config"], files["experts"] // 4
        limit = budget + (QUICK_BESIDES if quick else BESIDES)
        ways = _ways(folder, config, budget, quick=quick)
        comparison = Comparison(ways, Path(folder), config["vocabSize"], tokens)
        comparison.without_limit(rounds)
        comparison.refuse(limit)
        with held(limit) as holding:
            for _ in range(rounds):
                comparison.under(holding)
    by, found = holding.by, comparison.found
    title = (
        f"{files['experts'] / MIB:,.0f} MiB of f32 experts of {files['expert'] / MIB:.0f} MiB, "
        f"{THREADS} threads, {tokens} tokens a pass; {budget / MIB:,.0f} MiB for experts and "
        f"{(limit - budget) / MIB:.0f} besides, held by {by}, "
        "for sides with all weights in their own memory by RLIMIT_DATA"
    )
    return Report([_table(title, found, limit)], _targets(found, by))


def make_files(folder: str, dims: dict[str, int]) -> dict[str, Any]:
    """The same weights in the form of every side; f16 has them exactly.

    Returns the model's config, the bytes of all its experts and of one, in float32.
    """
    import onnx
    from evermind_exporters.checkpoints import Checkpoint, write_evl0
    from evermind_manifests.package import open_package

    from .models import language_model, package
    from .sides import compile_bound, dense_model

    source = language_model(**dims)
    tensors = {
        name: array.astype(np.float16).astype(np.float32) for name, array in source.tensors.items()
    }
    source = dataclasses.replace(source, tensors=tensors)
    place = Path(folder)
    for dtype in ("f32", "f16"):
        package(source, place / dtype, dtype=dtype)
    checkpoint = Checkpoint("evermind-lm", source.config, tensors)
    (place / "model.evl0").write_bytes(write_evl0(checkpoint))
    model = dense_model(source.config, tensors)
    onnx.save_model(model, place / "whole.onnx")
    onnx.save_model(
        model,
        place / "graph.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="graph.weights",
    )
    if which("cc"):
        compile_bound(place)
    with open_package(place / "f32") as opened:
        sizes = [shard.bytes for shard in opened.manifest.shards]
    return {"config": source.config, "experts": sum(sizes), "expert": sizes[0]}


class Comparison:
    """What all ways are given, and what they gave; `folder` is for what passes between them."""

    def __init__(self, ways: Iterable[Way], folder: Path, vocabulary: int, tokens: int) -> None:
        self._logits = folder / "logits.npy"
        rng = np.random.default_rng(0)
        # After the second nearly every expert was met: what a side does once for each, is done.
        lengths = {COLD: tokens, BETWEEN: 3 * tokens, WARM: tokens}
        self._tokens = {
            row: rng.integers(0, vocabulary, length).tolist() for row, length in lengths.items()
        }
        self._expected: list[np.ndarray] = []
        self._ways = list(ways)
        self.found: dict[str, Found | str] = {}

    def without_limit(self, rounds: int) -> None:
        """All ways side by side, with all the memory they want; logits are the first one's."""
        ways = [way for way in self._ways if not way.lacks]
        passes: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
        with ExitStack() as stack:
            workers = [stack.enter_context(_opened(way)) for way in ways]
            for way, worker in zip(ways, workers, strict=True):
                self._pass(way, worker, COLD)
                self._pass(way, worker, BETWEEN)
            for _ in range(rounds):
                for way, worker in zip(ways, workers, strict=True):
                    passes[way.name].append(self._pass(way, worker, WARM))
        for way in self._ways:
            if way.lacks:
                self.found[way.name] = f"not measured: {way.lacks}"
                continue
            tokens = len(self._given(way, WARM))
            rate = tokens / median([one["seconds"] for one in passes[way.name]])
            self.found[way.name] = Found(tokens, rate, passes[way.name][-1]["own"])

    def refuse(self, limit: int) -> None:
        """Have ways whose weights are memory of their own tried where that is limited."""
        for way in self._ways:
            found = self.found[way.name]
            if way.own and isinstance(found, Found):
                found.refused = self._refused(way, limit)

    def under(self, holding: Held) -> None:
        """One round: every way that runs, in a new process, from a cold disk and once more."""
        for way in self._ways:
            found = self.found[way.name]
            if isinstance(found, str) or found.refused:
                continue
            with _opened(way, begun=holding.join, **way.limited) as worker:
                cold = self._pass(way, worker, COLD, cold=True)
                self._pass(way, worker, BETWEEN)
                warm = self._pass(way, worker, WARM)
            found.cold.append(found.tokens / cold["seconds"])
            found.warm.append(found.tokens / warm["seconds"])
            found.cached.append(warm["cached"])

    def _refused(self, way: Way, limit: int) -> bool:
        """Whether it ends for want of memory. Raises `RuntimeError` where it fails otherwise."""
        try:
            with _opened(way, own_limit=limit) as worker:
                self._pass(way, worker, COLD)
        except RuntimeError as error:
            said = str(error).strip().splitlines()[-1]
            if not any(one in said for one in NO_MEMORY):
                raise
            return True
        return False

    def _given(self, way: Way, row: int) -> list[int]:
        tokens: list[int] = self._tokens[row]
        return tokens[: max(1, len(tokens) // way.fewer)]

    def _pass(self, way: Way, worker: Worker, row: int, *, cold: bool = False) -> dict[str, float]:
        given = self._given(way, row)
        passed: dict[str, float] = worker("timed", tokens=given, file=str(self._logits), cold=cold)
        logits = np.load(self._logits)
        if row == len(self._expected):
            self._expected.append(logits)
        expected = self._expected[row][: len(given)]
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        assert error <= TOLERANCE, (way.name, error)
        return passed


def _opened(way: Way, **more: Any) -> Worker:
    target = f"benchmarks.limited_sides.{way.side}"
    return Worker(target, threads=THREADS, **way.arguments, **more)


def _ways(folder: str, config: dict[str, Any], budget: int, *, quick: bool) -> list[Way]:
    """The first one's logits are the reference."""
    place = Path(folder)
    f32, f16 = {"package": str(place / "f32")}, {"package": str(place / "f16")}
    # As the runtime chooses where it sees that memory is short; small experts are not read so.
    io = {"io": "auto" if quick else "direct"}
    file = {"file": str(place / "model.evl0")}
    bound = {**file, "library": str(place / "c_bound.so")}
    dense = {"model": str(place / "graph.onnx"), "weights": str(place / "graph.weights")}
    no_compiler = None if which("cc") else "no C compiler"
    mapped, read = {"mapped": True}, {"mapped": False}
    return [
        Way(OURS, "Ours", {**f32, "budget": budget}, io),
        Way(TRUSTING, "Ours", {**f32, "budget": budget, "verify": "never"}, io),
        Way(HALF, "Ours", {**f16, "budget": budget}, io),
        Way("its graphs, experts mapped", "Ours", {**f32, "budget": budget, **mapped}),
        Way("C, one thread, weights mapped", "Compiled", {**bound, **mapped}, lacks=no_compiler),
        Way("numpy, weights mapped", "Numpy", {**file, **mapped}),
        Way("dense ONNX graph, weights mapped", "Dense", {**dense, "config": config}, fewer=8),
        Way("evermind-pack f32, all resident", "Ours", {**f32, "plan": "half"}, own=True),
        Way("C, one thread, weights in memory", "Compiled", {**bound, **read}, own=True,
            lacks=no_compiler),
        Way("numpy, weights in memory", "Numpy", {**file, **read}, own=True),
        Way("dense ONNX graph, weights inside", "Dense",
            {"model": str(place / "whole.onnx"), "config": config}, own=True, fewer=8),
        Way("npm peer", "Npm", {**file, "config": config}, own=True, fewer=8, lacks=missing()),
    ]  # fmt: skip


def _table(title: str, results: Mapping[str, Found | str], limit: int) -> Table:
    rows: list[list[Cell]] = []
    for name, found in results.items():
        if isinstance(found, str):
            rows.append([f"{name}: {found}", *[None] * 6])
            continue
        own = found.own / MIB
        under: Sequence[Cell] = [None] * 3
        if found.refused:
            name += f": does not run with {limit / MIB:,.0f} MiB"
        else:
            under = [median(found.cold), median(found.warm), median(found.cached) / MIB]
        rows.append([name, found.tokens, own, found.free, *under])
    columns = [
        "side",
        "tokens",
        "memory of its own, MiB",
        "tokens/s without a limit",
        "under it, disk cold",
        "under it, warm",
        "then of its files in the page cache, MiB",
    ]
    return Table(title, columns, rows)


def _targets(results: Mapping[str, Found | str], by: str) -> list[Target]:
    ours = results[OURS]
    assert isinstance(ours, Found)
    peers = {
        name: found
        for name, found in results.items()
        if isinstance(found, Found) and found.cold and name not in (OURS, TRUSTING, HALF)
    }
    targets = []
    for how in ("cold", "warm"):
        times = {name: ratio(getattr(ours, how), getattr(one, how)) for name, one in peers.items()}
        shown = ", ".join(f"{value:.2f} x ({name})" for name, value in times.items())
        targets.append(
            Target(
                f"f32 against every peer under the same limit, {how}",
                "at least 1.4 x",
                f"no limit was enforced: {HOW}" if by == UNHELD else shown,
                by != UNHELD and min(times.values()) >= 1.4,
            )
        )
    return targets


if __name__ == "__main__":
    run(measure)
