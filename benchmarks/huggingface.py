"""One Hugging Face checkpoint in this runtime, llama.cpp, transformers and accelerate."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .common import MIB, Cell, Report, Table, Target, fresh, median, ratio, run
from .hf_models import BIG, MID, TINY, write_checkpoint, write_gguf
from .hf_sides import missing
from .memory_limit import HOW, UNHELD, held
from .workers import Worker

THREADS = 2
PROMPT = 64
# Enough for every expert to be read, and so verified, before anything is timed.
WARM_UP = 512
LIMIT = 0.40
# For what a process needs apart from weights: libraries, caches of keys and values, intermediates.
BESIDES = 256 * MIB
OURS, LLAMA, ACCELERATE = "evermind-pack", "llama.cpp", "accelerate"


@dataclass(frozen=True)
class Files:
    """The same weights in the form of every side; `bytes` in half precision."""

    checkpoint: Path
    package: Path
    gguf: Path
    offload: Path
    bytes: int
    vocabulary: int


@dataclass(frozen=True)
class Way:
    """One side: the class in `hf_sides`, what it is made with, and the modules it needs.

    `tolerance` bounds the median over tokens of the largest difference of logits, relative to
    the largest logit. Peers round more than weights to half precision; and where two experts are
    as good as equal another one may be chosen, which moves that token's logits far.
    """

    name: str
    side: str
    tolerance: float
    arguments: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    #: It decodes one of so many tokens that the others decode.
    tokens: int = 1
    #: Its opening holds all weights at once, and so comes before the limit.
    opens_whole: bool = False


@dataclass
class Found:
    """What one side gave."""

    opened: dict[str, float]
    error: float = 0.0
    same: float = 1.0
    rounds: list[dict[str, float]] = field(default_factory=list)

    def rates(self, of: str) -> list[float]:
        """Tokens a second in every round."""
        return [one[f"{of} tokens"] / one[of] for one in self.rounds]


def measure(quick: bool) -> Report:
    tokens, rounds = (4, 1) if quick else (48, 5)
    with ExitStack() as stack:
        files = make_files(stack, TINY if quick else MID)
        whole = compare(_resident_ways(files), files.vocabulary, tokens, rounds)
        titles = [_title("all resident or, with a budget, from a warm page cache", files)]
        if not quick:
            stack.close()
            tokens, rounds = 24, 3
            files = make_files(stack, BIG)
        limit = int(LIMIT * files.bytes)
        ways = _limited_ways(files, limit, direct=not quick)
        limited, by = compare_limited(ways, files.vocabulary, tokens, rounds, limit)
        how = f"{limit / MIB:,.0f} MiB for weights and {BESIDES / MIB:.0f} besides, held by {by}"
        titles.append(_title(how, files))
    tables = [_table(title, found) for title, found in zip(titles, (whole, limited), strict=True)]
    return Report(tables, _targets(whole, limited, by))


def make_files(stack: ExitStack, dims: dict[str, int]) -> Files:
    """A checkpoint, the package imported from it and, where it can be written, a GGUF file."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    checkpoint, package, gguf = folder / "checkpoint", folder / "package", folder / "model.gguf"
    parameters = fresh(write_checkpoint, folder=checkpoint, dims=dims)
    fresh(import_package, checkpoint=checkpoint, package=package)
    if not missing("llama_cpp", "gguf"):
        fresh(write_gguf, folder=checkpoint, file=gguf, dims=dims)
    return Files(checkpoint, package, gguf, folder / "offload", 2 * parameters, dims["vocabulary"])


def import_package(checkpoint: str, package: str) -> None:
    """As `evermind-pack import` does it."""
    from evermind_exporters.huggingface.import_ import import_checkpoint

    import_checkpoint(Path(checkpoint), Path(package))


def compare(
    ways: Iterable[Way], vocabulary: int, tokens: int, rounds: int
) -> dict[str, Found | str]:
    """Every way, or why it was not measured: logits compared with the first one's, then timed.

    In interleaved rounds, each of other tokens.
    """
    with ExitStack() as stack:
        comparison = _Comparison(ways, vocabulary, tokens, rounds)
        workers = [(way, stack.enter_context(comparison.open(way))) for way in comparison.ways]
        for way, worker in workers:
            comparison.check(way, worker)
        for at in range(rounds):
            for way, worker in workers:
                comparison.time(way, worker, at)
    return comparison.results


def compare_limited(
    ways: Iterable[Way], vocabulary: int, tokens: int, rounds: int, limit: int
) -> tuple[dict[str, Found | str], str]:
    """As `compare`, with `limit` bytes for weights; also says what holds the limit.

    One way after the other, since what another one holds would count.
    """
    comparison = _Comparison(ways, vocabulary, tokens, rounds)
    with ExitStack() as stack:
        early = {
            way.name: stack.enter_context(comparison.open(way))
            for way in comparison.ways
            if way.opens_whole
        }
        with held(limit + BESIDES) as holding:
            for way in comparison.ways:
                with ExitStack() as turn:
                    if worker := early.get(way.name):
                        holding.join(worker.process)
                    else:
                        worker = turn.enter_context(comparison.open(way, holding.join))
                    comparison.check(way, worker)
                    comparison.warm(worker)
                    for at in range(rounds):
                        comparison.time(way, worker, at)
    return comparison.results, holding.by


class _Comparison:
    """What all ways are given, and what they gave."""

    def __init__(self, ways: Iterable[Way], vocabulary: int, tokens: int, rounds: int) -> None:
        rng = np.random.default_rng(0)
        self._prompt, self._long = (
            rng.integers(0, vocabulary, count).tolist() for count in (PROMPT, WARM_UP)
        )
        # For the check, then for every round.
        self._forced = rng.integers(0, vocabulary, (1 + rounds, tokens)).tolist()
        self._expected: np.ndarray | None = None
        self.results: dict[str, Found | str] = {}
        self.ways = []
        for way in ways:
            if how := missing(*way.needs):
                self.results[way.name] = f"not measured: {how}"
            else:
                self.ways.append(way)

    def open(self, way: Way, begun: Callable[[int], None] | None = None) -> Worker:
        target = f"benchmarks.hf_sides.{way.side}"
        return Worker(target, threads=THREADS, begun=begun, **way.arguments)

    def check(self, way: Way, worker: Worker) -> None:
        """Its logits are the first way's."""
        forced = self._forced[0][: max(1, len(self._forced[0]) // way.tokens)]
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/logits.npy"
            opened = worker("logits", prompt=self._prompt, forced=forced, file=file)
            logits = np.load(file)
        if self._expected is None:
            self._expected = logits
        error, same = _compared(logits, self._expected)
        assert error <= way.tolerance, (way.name, error)
        self.results[way.name] = Found(opened, error, same)

    def warm(self, worker: Worker) -> None:
        """Have it touch all experts."""
        worker("timed", prompt=self._long, forced=[])

    def time(self, way: Way, worker: Worker, at: int) -> None:
        row = self._forced[1 + at]
        row = row[: max(1, len(row) // way.tokens)]
        found = self.results[way.name]
        assert isinstance(found, Found)
        found.rounds.append(worker("timed", prompt=self._prompt, forced=row))


def _resident_ways(files: Files) -> list[Way]:
    package, checkpoint = str(files.package), str(files.checkpoint)
    return [
        Way("transformers, f32", "Transformers", 0, {"folder": checkpoint, "dtype": "float32"}),
        Way(OURS, "Ours", 5e-5, {"package": package}),
        *(
            Way(f"{OURS}, {share} of the experts", "Ours", 5e-5,
                {"package": package, "budget": share})
            for share in ("50%", "25%")
        ),
        Way("transformers, bf16", "Transformers", 0.5,
            {"folder": checkpoint, "dtype": "bfloat16"}),
        Way(LLAMA, "LlamaCpp", 0.05, {"file": str(files.gguf)}, ("llama_cpp", "gguf")),
    ]  # fmt: skip


def _limited_ways(files: Files, limit: int, *, direct: bool) -> list[Way]:
    ours = {"package": str(files.package), "limit": limit, "io": "direct" if direct else "auto"}
    offload = {"folder": str(files.checkpoint), "offload": str(files.offload)}
    return [
        Way(OURS, "Ours", 0, ours),
        Way(LLAMA, "LlamaCpp", 0.05, {"file": str(files.gguf)}, ("llama_cpp", "gguf")),
        Way(ACCELERATE, "Accelerate", 0.5, {**offload, "dtype": "bfloat16"}, ("accelerate",), 12,
            opens_whole=True),
    ]  # fmt: skip


def _compared(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The median over tokens of the largest difference; the share with the same best token."""
    expected = expected[: len(found)]
    errors = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    return float(np.median(errors)), float((found.argmax(1) == expected.argmax(1)).mean())


def _title(how: str, files: Files) -> str:
    return f"{THREADS} threads, {files.bytes / MIB:,.0f} MiB of weights in half precision, {how}"


def _table(title: str, results: Mapping[str, Found | str]) -> Table:
    rows: list[list[Cell]] = []
    for name, found in results.items():
        if isinstance(found, str):
            rows.append([f"{name}: {found}", *[None] * 8])
            continue
        rows.append(
            [
                name,
                median(found.rates("decode")),
                median(found.rates("prefill")),
                found.opened["opening"],
                found.opened["first"],
                median([one["resident"] for one in found.rounds]) / MIB,
                max(one["cached"] for one in found.rounds) / MIB,
                found.error,
                found.same,
            ]
        )
    columns = [
        "side",
        "decode, tokens/s",
        f"prompt of {PROMPT}, tokens/s",
        "opening, s",
        "to the first token, s",
        "RSS, MiB",
        "of its files in the page cache, MiB",
        "logits differ by",
        "same best token",
    ]
    return Table(title, columns, rows)


def _targets(
    whole: Mapping[str, Found | str], limited: Mapping[str, Found | str], by: str
) -> list[Target]:
    limit = f"under a limit of {LIMIT:.0%}"
    why = f"no limit was enforced: {HOW}" if by == UNHELD else None
    return [
        _target("decode against llama.cpp f16, all resident", 1, whole, LLAMA),
        _target(f"decode against llama.cpp's mmap {limit}", 3, limited, LLAMA, why),
        _target(f"decode against accelerate's disk offload {limit}", 3, limited, ACCELERATE, why),
    ]


def _target(
    what: str, wanted: float, results: Mapping[str, Found | str], peer: str, why: str | None = None
) -> Target:
    ours, theirs = results[OURS], results[peer]
    assert isinstance(ours, Found)
    if isinstance(theirs, str) or why:
        return Target(what, f"at least {wanted:.1f} x", why or str(theirs), met=False)
    times = ratio(ours.rates("decode"), theirs.rates("decode"))
    return Target(what, f"at least {wanted:.1f} x", f"{times:.2f} x", times >= wanted)


if __name__ == "__main__":
    run(measure)
