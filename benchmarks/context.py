"""An imported model's speed by context: attention's caches in place, and as they are exported.

Both packages come from one checkpoint. transformers' exported graph takes a cache and gives a
longer one; in the other, attention fills buffers of the state (docs/huggingface.md). A third is
that checkpoint with a sliding window, whose buffers are bounded, or made to keep every token.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from .common import (
    MIB,
    Cell,
    Report,
    Table,
    Target,
    fresh,
    interleaved,
    median,
    peak_bytes,
    ratio,
    resident_bytes,
    run,
)

FORMS = ("exported", "in place")
WINDOWED = ("all kept", "bounded")
# Decoded at each context in a round.
STEPS = 8


def measure(quick: bool) -> Report:
    from .hf_models import CONTEXT, MID, TINY

    contexts = [16, 64] if quick else [64, 1024, 3500]
    assert contexts[-1] + STEPS < CONTEXT
    window = 8 if quick else 128
    with tempfile.TemporaryDirectory() as name:
        paths = fresh(packages, folder=name, dims=TINY if quick else MID, window=window)
        rounds = 1 if quick else 7
        found = fresh(speeds, paths=paths, contexts=contexts, rounds=rounds)
        peaks = {
            form: fresh(peak, path=path, form=form, context=contexts[-1])
            for form, path in paths.items()
        }
    return report(found, peaks, contexts, window)


def report(
    found: dict[str, Any], peaks: dict[str, Any], contexts: list[int], window: int
) -> Report:
    slowest = ratio(*(found["decode"][f"{form} {contexts[-1]}"] for form in FORMS))
    memory: list[list[Cell]] = [
        [form, one["state"] / MIB, (one["peak"] - one["before"]) / MIB]
        for form, one in peaks.items()
    ]
    return Report(
        [
            Table("Tokens/s", ["", *FORMS, "ratio"], _rows(found, contexts, FORMS)),
            Table(
                f"Tokens/s with a window of {window} tokens",
                ["", *WINDOWED, "ratio"],
                _rows(found, contexts, WINDOWED),
            ),
            Table(
                f"Memory after {contexts[-1]:,} tokens, in MiB",
                ["cache", "state", "most in the process beyond the model"],
                memory,
            ),
        ],
        [
            Target(
                f"decode after {contexts[-1]:,} tokens, in place",
                "at least 1.5 times the exported form",
                f"{slowest:.2f} times",
                slowest >= 1.5,
            )
        ],
    )


def _rows(found: dict[str, Any], contexts: list[int], forms: tuple[str, str]) -> list[list[Cell]]:
    pairs = {
        f"decode after {context:,}": [found["decode"][f"{form} {context}"] for form in forms]
        for context in contexts
    }
    rows: list[list[Cell]] = [
        [name, *(STEPS / median(one) for one in pair), ratio(*pair)] for name, pair in pairs.items()
    ]
    pair = [found["prefill"][form] for form in forms]
    rates = [contexts[-1] / median(one) for one in pair]
    return [*rows, [f"prefill of {contexts[-1]:,}", *rates, ratio(*pair)]]


def speeds(paths: dict[str, str], contexts: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of STEPS tokens at each context, and of a prompt; before, the forms agree."""
    import evermind_runtime as em

    decode, prefill = {}, {}
    logits: dict[str, Any] = {}
    for form, path in paths.items():
        model = em.load(path, plan="half")
        vocabulary = model.manifest.plan.inputs["tokens"].limit
        tokens = np.random.default_rng(0).integers(0, vocabulary, contexts[-1] + STEPS)
        state = _new_state(model, form)
        some = tokens[: min(1024, contexts[-1])]
        logits[form] = model.forward({"tokens": some}, state=state)["logits"][-64:]
        for context in contexts:
            state = _new_state(model, form)
            model.forward({"tokens": tokens[: context - 1]}, state=state, outputs=[])
            model.decode({"tokens": tokens[context - 1 : context]}, state)
            after = tokens[context : context + STEPS]

            def go(model: em.Model = model, state: Any = state, after: Any = after) -> None:
                mark = state.mark()
                for token in after:
                    model.decode({"tokens": token[None]}, state)
                state.rewind(mark)

            decode[f"{form} {context}"] = go

        def ask(
            model: em.Model = model, form: str = form, prompt: Any = tokens[: contexts[-1]]
        ) -> None:
            model.forward({"tokens": prompt}, state=_new_state(model, form), outputs=[])

        prefill[form] = ask
    for one, other in (FORMS, WINDOWED):
        error = np.abs(logits[one] - logits[other]).max()
        assert error <= 1e-5 * np.abs(logits[one]).max()
    return {
        "decode": interleaved(decode, rounds),
        "prefill": interleaved(prefill, max(1, rounds // 3), warm_up=False),
    }


def _new_state(model: Any, form: str) -> Any:
    """A state, one that forgets nothing where all is kept."""
    with (
        mock.patch("evermind_runtime.rows.spare_rows", return_value=1 << 30)
        if (form == "all kept")
        else nullcontext()
    ):
        return model.new_state()


def peak(path: str, form: str, context: int) -> dict[str, int]:
    """Bytes of a state after `context` tokens, of the process before them, and at most."""
    import evermind_runtime as em

    with em.load(path, plan="half") as model:
        model.forward({"tokens": [0, 1]}, steps="decode")
        before = resident_bytes()
        state = _new_state(model, form)
        tokens = np.arange(context) % 100
        model.forward({"tokens": tokens}, state=state, outputs=[])
        model.decode({"tokens": tokens[:1]}, state)
        return {
            "state": sum(array.nbytes for array in state.current.values()),
            "before": before,
            "peak": peak_bytes(),
        }


def packages(folder: str, dims: dict[str, int], window: int) -> dict[str, str]:
    """Import one checkpoint in both forms, and with a window; gives the packages' paths."""
    from evermind_exporters.huggingface import attention
    from evermind_exporters.huggingface.import_ import ImportOptions, import_checkpoint

    from .hf_models import write_checkpoint

    source = Path(folder) / "checkpoint"
    write_checkpoint(str(source), dims)
    paths = {form: str(Path(folder) / form) for form in FORMS}
    for form, path in paths.items():
        with nullcontext() if form == "in place" else _attention_as_exported(attention):
            import_checkpoint(source, Path(path), ImportOptions(dtype="f16"))
    config = source / "config.json"
    fields = json.loads(config.read_text()) | {"use_sliding_window": True, "sliding_window": window}
    config.write_text(json.dumps(fields))
    path = str(Path(folder) / "windowed")
    import_checkpoint(source, Path(path), ImportOptions(dtype="f16"))
    return paths | dict.fromkeys(WINDOWED, path)


def _attention_as_exported(attention: Any) -> AbstractContextManager[Any]:
    return mock.patch.object(attention, "survey", return_value=None)


if __name__ == "__main__":
    run(measure)
