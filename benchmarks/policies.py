"""Hit rates of the default policy on recorded traces, beside LRU and Belady's bound."""

from __future__ import annotations

from evermind_runtime.layers import all_bytes
from evermind_runtime.replay import replay
from evermind_runtime.trace import read_trace

from .common import ROOT, Cell, Report, Table, Target, run

TRACES = ROOT / "tests" / "fixtures" / "traces"
POLICIES = ("decayed", "lru", "belady")
SHARES = (0.0625, 0.125, 0.25, 0.5, 0.75)


def measure(quick: bool) -> Report:
    rows: list[list[Cell]] = []
    below_belady: dict[str, float] = {}
    above_lru: dict[str, float] = {}
    for path in sorted(TRACES.glob("*.jsonl"), reverse=True):
        trace = read_trace(path)
        for share in SHARES[2:3] if quick else SHARES:
            budget = int(share * all_bytes(trace.layers))
            rates = {name: replay(trace, name, budget).hit_rate for name in POLICIES}
            rows.append([f"{path.stem}, {share:.4g} of the experts", *rates.values()])
            below, above = rates["belady"] - rates["decayed"], rates["decayed"] - rates["lru"]
            below_belady[path.stem] = max(below, below_belady.get(path.stem, below))
            above_lru[path.stem] = min(above, above_lru.get(path.stem, above))
    return Report(
        [Table("Hit rate on recorded traces", ["trace, budget", *POLICIES], rows)],
        [
            Target(
                "default policy against Belady",
                "at most 0.15 below",
                ", ".join(f"{worst:.3f} below ({name})" for name, worst in below_belady.items()),
                max(below_belady.values()) <= 0.15,
            ),
            Target(
                "default policy against LRU",
                "never more than 0.01 below",
                ", ".join(f"{least:+.3f} ({name})" for name, least in above_lru.items()),
                min(above_lru.values()) >= -0.01,
            ),
        ],
    )


if __name__ == "__main__":
    run(measure)
