"""Replays: the pager's own counts, the bound, and the targets on a recorded trace."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import BudgetError
from evermind_runtime.budget import token_cycle_bytes, working_set_bytes
from evermind_runtime.layers import ExpertLayer, all_bytes, step_bytes
from evermind_runtime.policies import ExpertKey, LruPolicy
from evermind_runtime.profile import encode_profile, profile_of
from evermind_runtime.replay import POLICIES, acquisitions, replay, simulate
from evermind_runtime.trace import Trace, TraceStep, read_trace
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

TRACES = Path(__file__).parent.parent / "fixtures" / "traces"


@cache
def olmoe() -> Trace:
    return read_trace(TRACES / "olmoe_299.jsonl")


def rate(trace: Trace, policy: str, share: float) -> float:
    return replay(trace, policy, int(share * all_bytes(trace.layers))).hit_rate


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_the_default_meets_its_targets_on_olmoe(share: float) -> None:
    found = rate(olmoe(), "decayed", share)
    assert found >= rate(olmoe(), "belady", share) - 0.15
    assert found >= rate(olmoe(), "lru", share) + 0.01
    assert found > rate(olmoe(), "lfu", share)


@pytest.mark.parametrize("share", [0.02, 0.0625, 0.1])
def test_below_a_token_cycle_recency_keeps_nothing_and_the_default_the_best(share: float) -> None:
    assert rate(olmoe(), "lru", share) == 0
    assert rate(olmoe(), "decayed", share) >= 0.5 * rate(olmoe(), "belady", share) > 0


def test_a_prompt_does_not_wash_out_what_follows() -> None:
    """150 tokens read expert by expert, then 30 decoded: as good as decoding them all."""
    layers, steps = olmoe().layers, olmoe().steps
    rows = [[step.tokens[0] for step in steps[at::16]] for at in range(16)]
    chunks = [TraceStep(at, tuple(rows[at][begin : begin + 75]))
              for begin in (0, 75) for at in range(16)]  # fmt: skip
    decoded = list(steps[150 * 16 : 180 * 16])
    budget = all_bytes(layers) // 2

    def after(head: list[TraceStep], policy: str) -> float:
        before = replay(Trace(layers, tuple(head)), policy, budget)
        whole = replay(Trace(layers, tuple(head + decoded)), policy, budget)
        return (whole.hits - before.hits) / (30 * 16 * 8)

    found = after(chunks, "decayed")
    assert found >= after(list(steps[: 150 * 16]), "decayed") - 0.02
    assert found >= after(chunks, "lru") + 0.05
    prompt = Trace(layers, tuple(chunks))
    bound = replay(prompt, "belady", budget)
    assert replay(prompt, "decayed", budget).hits >= 0.95 * bound.hits > 0


@st.composite
def traces(draw: st.DrawFn, *, mixed_sizes: bool = False) -> Trace:
    count = draw(st.integers(1, 2))
    layers = tuple(
        ExpertLayer(
            layer=at,
            experts=draw(st.integers(2, 4)),
            top_k=draw(st.integers(1, 2)),
            bytes=draw(st.integers(1, 9)) if mixed_sizes else 1,
        )
        for at in range(count)
    )
    rows = [
        st.lists(
            st.integers(0, layer.experts - 1),
            min_size=layer.top_k,
            max_size=layer.top_k,
            unique=True,
        )
        for layer in layers
    ]
    steps = []
    for at in range(draw(st.integers(1, 10))):
        tokens = draw(st.lists(rows[at % count], min_size=1, max_size=3))
        steps.append(TraceStep(at % count, tuple(map(tuple, tokens))))
    return Trace(layers, tuple(steps))


def fewest_misses(trace: Trace, capacity: int) -> int:
    """By trying everything: at each acquisition, every set of experts that could stay."""
    best: dict[frozenset[ExpertKey], int] = {frozenset(): 0}
    for step in trace.steps:
        for keys in acquisitions(step, 1, capacity):
            needed = frozenset(keys)
            reached: dict[frozenset[ExpertKey], int] = {}
            for held, misses in best.items():
                after = misses + len(needed - held)
                # Dropping more than one must never helps: drop down to the capacity only.
                sets = {held | needed}
                while any(len(one) > capacity for one in sets):
                    sets = {one - {key} for one in sets for key in one - needed}
                for one in sets:
                    reached[one] = min(after, reached.get(one, after))
            best = reached
    return min(best.values())


@settings(max_examples=80, deadline=None)
@given(trace=traces(), extra=st.integers(0, 4))
def test_belady_is_the_bound(trace: Trace, extra: int) -> None:
    budget = step_bytes(trace.layers) + extra
    assert replay(trace, "belady", budget).misses == fewest_misses(trace, budget)


class Checking(LruPolicy):
    """Counts the bytes that are resident, from what a policy is told."""

    def __init__(self, trace: Trace, budget: int) -> None:
        super().__init__()
        self.size = {layer.layer: layer.bytes for layer in trace.layers}
        self.resident: set[ExpertKey] = set()
        self.budget = budget

    def touched(self, key: ExpertKey) -> None:
        super().touched(key)
        self.resident.add(key)
        assert sum(self.size[layer] for layer, _ in self.resident) <= self.budget

    def removed(self, key: ExpertKey) -> None:
        super().removed(key)
        self.resident.remove(key)


@settings(max_examples=60, deadline=None)
@given(trace=traces(mixed_sizes=True), extra=st.integers(0, 20))
def test_every_policy_keeps_the_budget_with_layers_of_different_sizes(
    trace: Trace, extra: int
) -> None:
    budget = step_bytes(trace.layers) + extra
    simulate(trace, Checking(trace, budget), budget)
    needs = sum(len(keys) for step in trace.steps for keys in acquisitions(step, 1, 1))
    for policy in POLICIES:
        found = replay(trace, policy, budget)
        assert found.hits + found.misses == needs
        assert found.bytes_read >= found.misses


def test_with_room_for_all_every_policy_reads_each_expert_once() -> None:
    budget = all_bytes(olmoe().layers)
    seen = {(s.layer, expert) for s in olmoe().steps for row in s.tokens for expert in row}
    for policy in POLICIES:
        assert replay(olmoe(), policy, budget).misses == len(seen)


def test_a_budget_below_one_step_is_refused() -> None:
    assert replay(olmoe(), "decayed", 8).misses > 0
    with pytest.raises(BudgetError, match="8 bytes"):
        replay(olmoe(), "decayed", 7)


@pytest.mark.parametrize("policy", ["decayed", "lru", "pinned"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.8])
def test_a_replay_counts_what_the_pager_counted(
    lm_package: Path, policy: str, share: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    with em.load(lm_package, plan="half") as model:
        least, cycle = working_set_bytes(model.manifest), token_cycle_bytes(model.manifest)
        model.trace(tmp_path / "t.jsonl")
        _use(model, rng)
    trace = read_trace(tmp_path / "t.jsonl")
    heat = tmp_path / "profile.json"
    heat.write_bytes(encode_profile(profile_of(trace)))
    budget = max(least, int(share * all_bytes(trace.layers)))
    assert share or budget < cycle
    profile = heat if policy == "pinned" else None
    with em.load(lm_package, budget=budget, policy=policy, profile=profile) as model:  # type: ignore[arg-type]
        _use(model, np.random.default_rng(5))
        stats = model.stats()
    found = replay(trace, policy, budget)
    assert (stats.expert_hits, stats.expert_misses, stats.bytes_read) == (
        found.hits,
        found.misses,
        found.bytes_read,
    )


def _use(model: em.Model, rng: np.random.Generator) -> None:
    """Prompts read in chunks, and tokens decoded after them."""
    for seed in random.Random(1).sample(range(1, 100), 3):
        prompt = rng.integers(0, 96, 30).tolist()
        list(model.generate(prompt, max_new_tokens=25, temperature=1.0, seed=seed))


def test_the_table_in_the_documentation_is_what_a_replay_gives() -> None:
    text = (Path(__file__).parents[2] / "docs" / "paging.md").read_text()
    lines = text.partition("olmoe_299.jsonl --budgets ")[2].splitlines()
    shares = [float(size.rstrip("%")) / 100 for size in lines[0].split(",")]
    for line, policy in zip(lines[2:], POLICIES, strict=False):
        assert line.split() == [
            policy,
            *(f"{rate(olmoe(), policy, share):.3f}" for share in shares),
        ]
