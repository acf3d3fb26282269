"""One Hugging Face checkpoint in this runtime, llama.cpp, transformers and accelerate."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .common import MIB, Cell, Report, Table, Target, fresh, median, ratio, run
from .hf_models import BIG, MID, TINY, write_checkpoint, write_gguf
from .hf_sides import missing
from .memory_limit import CGROUP_VARIABLE
from .workers import Worker

THREADS = 2
PROMPT = 64
# Enough for every expert to be read, and so verified, before anything is timed.
WARM_UP = 512
LIMIT = 0.40
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
        held = compare(ways, files.vocabulary, tokens, rounds, limit=limit)
        titles.append(_title(f"no more than {limit / MIB:,.0f} MiB of weights in memory", files))
    tables = [_table(title, found) for title, found in zip(titles, (whole, held), strict=True)]
    return Report(tables, _targets(whole, held))


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
    ways: Iterable[Way], vocabulary: int, tokens: int, rounds: int, limit: int | None = None
) -> dict[str, Found | str]:
    """Every way, or why it was not measured: logits compared with the first one's, then timed.

    In interleaved rounds, each of other tokens; but under a limit that a control group enforces
    one side after the other, since what the others hold would count.
    """
    results: dict[str, Found | str] = {}
    rng = np.random.default_rng(0)
    prompt, long = (rng.integers(0, vocabulary, count).tolist() for count in (PROMPT, WARM_UP))
    forced = rng.integers(0, vocabulary, (1 + rounds, tokens)).tolist()
    routes: list[Any] = [None] * (1 + rounds)
    there = []
    for way in ways:
        if how := missing(*way.needs):
            results[way.name] = f"not measured: {how}"
        else:
            there.append(way)
    apart = limit is not None and CGROUP_VARIABLE in os.environ
    expected: np.ndarray | None = None
    for group in [[way] for way in there] if apart else [there]:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            workers = []
            for way in group:
                target = f"benchmarks.hf_sides.{way.side}"
                worker = stack.enter_context(Worker(target, threads=THREADS, **way.arguments))
                workers.append(worker)
                file, count = f"{folder}/logits.npy", max(1, tokens // way.tokens)
                opened = worker("logits", prompt=prompt, forced=forced[0][:count], file=file)
                found = np.load(file)
                expected = found if expected is None else expected
                one = results[way.name] = Found(opened)
                one.error, one.same = _compared(found, expected)
                assert one.error <= way.tolerance, (way.name, one.error)
                if limit is not None:
                    if routes[0] is None:  # the first way is ours
                        routes = [worker("routes", prompt=prompt, forced=row) for row in forced]
                    worker("hold", limit=limit)
                    worker("timed", prompt=long, forced=[])
            for at in range(1, 1 + rounds):
                for way, worker in zip(group, workers, strict=True):
                    row = forced[at][: max(1, tokens // way.tokens)]
                    timed = worker("timed", prompt=prompt, forced=row, routes=routes[at])
                    one = results[way.name]
                    assert isinstance(one, Found)
                    one.rounds.append(timed)
    return results


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
        Way(ACCELERATE, "Accelerate", 0.5, {**offload, "dtype": "bfloat16"}, ("accelerate",), 12),
    ]


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
            rows.append([f"{name}: {found}", *[None] * 7])
            continue
        rows.append(
            [
                name,
                median(found.rates("decode")),
                median(found.rates("prefill")),
                found.opened["opening"],
                found.opened["first"],
                median([one["resident"] for one in found.rounds]) / MIB,
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
        "logits differ by",
        "same best token",
    ]
    return Table(title, columns, rows)


def _targets(whole: Mapping[str, Found | str], held: Mapping[str, Found | str]) -> list[Target]:
    limit = f"under a limit of {LIMIT:.0%}"
    return [
        _target("decode against llama.cpp f16, all resident", 1, whole, LLAMA),
        _target(f"decode against llama.cpp's mmap {limit}", 3, held, LLAMA),
        _target(f"decode against accelerate's disk offload {limit}", 3, held, ACCELERATE),
    ]


def _target(what: str, wanted: float, results: Mapping[str, Found | str], peer: str) -> Target:
    ours, theirs = results[OURS], results[peer]
    assert isinstance(ours, Found)
    if isinstance(theirs, str):
        return Target(what, f"at least {wanted:.1f} x", theirs, met=False)
    times = ratio(ours.rates("decode"), theirs.rates("decode"))
    return Target(what, f"at least {wanted:.1f} x", f"{times:.2f} x", times >= wanted)


if __name__ == "__main__":
    run(measure)
