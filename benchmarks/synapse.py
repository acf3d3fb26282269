"""What a Synapse model takes per token, and what its checks and statistics add."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np

from .common import Cell, Report, Table, Target, fresh, interleaved, median, run

PROMPT = 256
STEPS = 32
# Width and layers; all else as in the defaults, scaled.
SIZES = {"d64 L2": (64, 2), "d256 L4": (256, 4)}


def measure(quick: bool) -> Report:
    rows: list[list[Cell]] = []
    checks = {}
    for name, (width, layers) in list(SIZES.items())[: 1 if quick else None]:
        found = fresh(tokens, width=width, layers=layers, rounds=2 if quick else 9, threads=1)
        micro = {side: 1e6 * median(seconds) for side, seconds in found["seconds"].items()}
        checks[name] = micro["check"] / micro["decode"]
        rows.append([name, *(round(micro[side]) for side in _SIDES), found["state"]])
    columns = ["model", *(f"{side}, us/token" for side in _SIDES), "state, bytes"]
    worst = max(checks, key=lambda name: checks[name])
    return Report(
        [Table("Synapse, f16 experts, one thread, all resident", columns, rows)],
        [
            Target(
                "check that state is finite",
                "at most 5 % of decoding",
                f"{checks[worst]:.1%} at most ({worst})",
                checks[worst] <= 0.05,
            )
        ],
    )


_SIDES = ("prefill", "prefill observed", "decode", "decode observed", "check")


def tokens(width: int, layers: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds per token of each side. Weights are random: the arithmetic is the same."""
    from evermind_exporters import ExportOptions, ModelSource, export_package
    from evermind_exporters.families import FAMILIES
    from evermind_runtime.finite import FiniteCheck

    from evermind_pack.models.synapse.initial import initial_weights

    raw = {"d_model": width, "d_expert": 4 * width, "d_xlstm_hidden": 2 * width}
    raw |= {"module": "model", "n_layers": layers, "vocab_size": 4096}
    config = FAMILIES["synapse"].resolve(raw, {})
    source = ModelSource("synapse", config, initial_weights(config), "bench")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        export_package(source, package, ExportOptions(dtype="f16"))
        with (
            em.load(package, threads=threads) as plain,
            em.load(package, threads=threads) as observed,
        ):
            observed.observe()
            ids = np.random.default_rng(0).integers(0, config["vocab_size"], PROMPT)
            state = plain.new_state()
            check = FiniteCheck(plain.manifest.plan)
            values = {**state.save(), "logits": np.zeros((1, 4096), dtype=np.float32)}

            def prompt(model: em.Model) -> None:
                model.forward({"tokens": ids}, outputs=["logits"])

            def steps(model: em.Model) -> None:
                model.forward({"tokens": ids[:STEPS]}, outputs=["logits"], steps="decode")

            sides = {
                "prefill": (lambda: prompt(plain), PROMPT),
                "prefill observed": (lambda: prompt(observed), PROMPT),
                "decode": (lambda: steps(plain), STEPS),
                "decode observed": (lambda: steps(observed), STEPS),
                "check": (lambda: [check.check(values) for _ in range(STEPS)], STEPS),
            }
            seconds = interleaved({name: side for name, (side, _) in sides.items()}, rounds)
    per_token = {
        name: [value / sides[name][1] for value in found] for name, found in seconds.items()
    }
    return {
        "seconds": per_token,
        "state": sum(array.nbytes for array in state.save().values()),
    }


if __name__ == "__main__":
    run(measure)
