"""Decoding one language model: this runtime under budgets beside the npm peer, C, numpy, ONNX."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import evermind_runtime as em
import numpy as np

from tests.interop.peer import Peer, floats, missing

from .common import Cell, Report, Seconds, Table, Target, fresh, interleaved, median, ratio, run

DIMS = {"vocab": 1024, "width": 128, "layers": 4, "experts": 16, "top_k": 2, "hidden": 256}
PROMPT = [1, 2, 3]
SEED = 7
# How much of the experts may be in memory, and the plan; "pools" hold them all as float32.
WAYS: dict[str, dict[str, Any]] = {
    "pools": {"plan": "resident"},
    "100%": {"plan": "half"},
    "50%": {"budget": "50%"},
    "25%": {"budget": "25%"},
    "12.5%": {"budget": "12.5%"},
}
# Logits are of the order of 1; the sides add up in different orders.
TOLERANCE = 1e-4


def measure(quick: bool) -> Report:
    from evermind_exporters.checkpoints import Checkpoint, write_evl0

    from .models import language_model, package

    new_tokens, rounds = (8, 1) if quick else (256, 9)
    source = language_model(**DIMS)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("f32", "f16"):
            package(source, Path(folder) / dtype, dtype=dtype)
        np.savez(Path(folder) / "tensors.npz", **source.tensors)
        tables, found = [], {}
        for threads in (1, 2):
            found[threads] = fresh(
                decode_all, threads=threads, folder=folder, config=source.config,
                new_tokens=new_tokens, rounds=rounds,
            )  # fmt: skip
            tables.append(_table(found[threads], new_tokens, threads))
    checkpoint = write_evl0(Checkpoint(source.family, source.config, source.tensors))
    peer = _peer(source.config, checkpoint, new_tokens, found[1])
    tables.append(Table("The npm peer, which computes its whole context again for every token",
                        ["", ""], list(map(list, peer.items()))))  # fmt: skip
    return Report(tables, _targets(found, peer, new_tokens))


def decode_all(
    threads: int, folder: str, config: dict[str, Any], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Seconds of every side in one process, after all gave the same logits.

    The runtime generates, sampling at temperature 1; the others decode the tokens it chose.
    """
    from .sides import CompiledModel, DenseGraph, NumpyModel, compile_bound, dense_model

    warnings.simplefilter("ignore", em.PagingWarning)
    tensors = dict(np.load(Path(folder) / "tensors.npz"))
    models = {
        f"evermind-pack {dtype}, {way}": em.load(Path(folder) / dtype, threads=threads, **options)
        for dtype in ("f32", "f16")
        for way, options in WAYS.items()
    }
    compiled = {}
    if which("cc"):
        compiled["C, fp32"] = CompiledModel(config, tensors, compile_bound(Path(folder)))
    dense = dense_model(config, tensors).SerializeToString()
    others = {
        **compiled,
        "numpy, fp32": NumpyModel(config, tensors),
        "dense ONNX graph of all experts": DenseGraph(config, dense, threads),
    }
    whole = models["evermind-pack f32, 100%"]

    def generated(model: em.Model) -> list[int]:
        pieces = model.generate(PROMPT, max_new_tokens=new_tokens, temperature=1.0, seed=SEED)
        return [piece.token for piece in pieces]

    made = generated(whole)
    fed = [*PROMPT, *made[:-1]]
    expected = whole.forward({"tokens": fed}, steps="decode", outputs=["logits"])["logits"]
    errors = {
        name: float(np.abs(side.decode(fed) - expected).max()) for name, side in others.items()
    }
    assert max(errors.values()) <= TOLERANCE, errors

    def decoding(side: Any) -> Callable[[], Any]:
        if isinstance(side, CompiledModel):
            return lambda: side.decode(fed[len(PROMPT) - 1 :], keep=False)
        return lambda: side.decode(fed[len(PROMPT) - 1 :])

    sides: dict[str, Callable[[], Any]] = {
        name: (lambda model=model: generated(model)) for name, model in models.items()
    }
    if threads > 1:
        others = {name: side for name, side in others.items() if name != "C, fp32"}
    sides |= {name: decoding(side) for name, side in others.items()}
    seconds = interleaved(sides, rounds)
    hit_rates = {name: model.stats().hit_rate for name, model in models.items()}
    return {
        "seconds": seconds,
        "hit rates": hit_rates,
        "tokens": made,
        "logits": expected[: len(PROMPT)].ravel().tolist(),
    }


def _table(found: dict[str, Any], new_tokens: int, threads: int) -> Table:
    seconds: Seconds = found["seconds"]
    bound = seconds.get("C, fp32")
    rows: list[list[Cell]] = []
    for name, values in seconds.items():
        own = f"{name.partition(',')[0]}, 100%"
        rows.append(
            [
                name,
                new_tokens / median(values),
                ratio(values, bound) if bound else None,
                ratio(seconds[own], values) if own in seconds else None,
                None if name.endswith("pools") else found["hit rates"].get(name),
            ]
        )
    columns = ["side", "tokens/s", "x C's time", "of its own all-resident speed", "hit rate"]
    title = f"{new_tokens} new tokens, {threads} compute thread{'s' * (threads > 1)}"
    return Table(title, columns, rows)


def _peer(
    config: dict[str, Any], checkpoint: bytes, new_tokens: int, found: dict[str, Any]
) -> dict[str, Cell]:
    if reason := missing():
        return {"not measured": reason}
    with Peer() as peer:
        answer = peer(
            "generate", config=config, checkpoint=checkpoint, tokens=PROMPT, steps=new_tokens,
            temperature=1.0, seed=SEED,
        )  # fmt: skip
    error = float(np.abs(floats(answer["logits"]) - np.float32(found["logits"])).max())
    assert error <= TOLERANCE, error
    made = answer["tokens"]
    made = made[len(PROMPT) :] if len(made) > new_tokens else made
    pairs = list(zip(made, found["tokens"], strict=True))
    equal = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return {
        "new tokens": new_tokens,
        "tokens/s": new_tokens / (answer["milliseconds"] / 1000),
        "of its tokens, equal to ours from the first on": equal,
    }


def _targets(
    found: dict[int, dict[str, Any]], peer: dict[str, Cell], new_tokens: int
) -> list[Target]:
    one, two = found[1]["seconds"], found[2]["seconds"]

    def fastest(seconds: Seconds) -> str:
        names = [name for name in seconds if name.endswith(("100%", "pools"))]
        return min(names, key=lambda name: median(seconds[name]))

    whole = fastest(one)
    bound = one.get("C, fp32")
    against_c = ratio(one[whole], bound) if bound else float("inf")

    def quarter(way: str) -> dict[str, float]:
        return {
            f"{dtype}, {threads} thread{'s' * (threads > 1)}": ratio(
                seconds[f"evermind-pack {dtype}, {way}"], seconds[f"evermind-pack {dtype}, 25%"]
            )
            for dtype in ("f32", "f16")
            for threads, seconds in ((1, one), (2, two))
        }

    targets = [
        Target(
            "time per token, all resident, one thread",
            "at most 1.6 x the C bound",
            f"{against_c:.2f} x ({whole})" if bound else "not measured: no C compiler",
            against_c <= 1.6,
        ),
        *(
            Target(
                f"a quarter of the experts, page cache warm, against all resident ({meant})",
                "at least 75 % of the tokens/s",
                ", ".join(f"{share:.0%} ({name})" for name, share in quarter(way).items()),
                min(quarter(way).values()) >= 0.75,
            )
            for way, meant in (("100%", "the same graphs"), ("pools", "in float32 pools"))
        ),
    ]
    if "tokens/s" in peer:
        # One thread is what such a package takes by itself.
        best = new_tokens / median(one[whole])
        times = best / float(peer["tokens/s"] or 1)
        targets.insert(
            0,
            Target(
                f"tokens/s against the npm peer, {new_tokens} new tokens",
                "at least 1,000 x",
                f"{times:,.0f} x",
                times >= 1000,
            ),
        )
    return targets


if __name__ == "__main__":
    run(measure)
