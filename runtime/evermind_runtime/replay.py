"""Offline replay: a recorded trace under any policy and budget, without weights. Pure.

The loop asks a policy exactly what the pager asks, in the same order, so a replay under a
model's own policy and budget counts the model's own hits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evermind_manifests.errors import BudgetError

from .choose_policy import make_policy
from .layers import all_bytes, step_bytes
from .policies import ExpertKey, LfuPolicy, Policy
from .policies.belady import BeladyPolicy
from .profile import Profile, profile_of
from .read_plan import plan_batches
from .trace import Trace, TraceStep


@dataclass(frozen=True, slots=True)
class Replay:
    """What one policy did with one budget (bytes)."""

    policy: str
    budget: int
    hits: int
    misses: int
    bytes_read: int

    @property
    def hit_rate(self) -> float:
        """Hits over all needs; 0 for a trace without any."""
        needs = self.hits + self.misses
        return self.hits / needs if needs else 0.0


POLICIES: dict[str, Callable[[Trace, int, Profile | None], Policy]] = {
    "decayed": lambda trace, budget, _: make_policy("decayed", trace.layers, budget),
    "pinned": lambda trace, budget, profile: make_policy(
        "pinned", trace.layers, budget, profile or profile_of(trace)
    ),
    "lru": lambda trace, budget, _: make_policy("lru", trace.layers, budget),
    "lfu": lambda _trace, _budget, _profile: LfuPolicy(),
    "belady": lambda trace, _budget, _profile: BeladyPolicy(
        [[key for keys in acquisitions(step, 1, 1) for key in keys] for step in trace.steps]
    ),
}
"""Every policy a replay compares. `pinned` without a profile knows the trace's own heat."""


def replay(trace: Trace, policy: str, budget: int, *, profile: Profile | None = None) -> Replay:
    """Run `trace` under one of `POLICIES`.

    Raises `BudgetError` for a budget that cannot hold one step.
    """
    needed = step_bytes(trace.layers)
    if budget < needed:
        share = math.ceil(1000 * needed / all_bytes(trace.layers)) / 10
        raise BudgetError(
            f"budget: {budget:,} bytes cannot hold the experts of one step, "
            f"which take {needed:,} bytes",
            hint=f"Give at least {needed} bytes, {share:g}% of all experts.",
        )
    hits, misses, bytes_read = simulate(trace, POLICIES[policy](trace, budget, profile), budget)
    return Replay(policy, budget, hits, misses, bytes_read)


def simulate(trace: Trace, policy: Policy, budget: int) -> tuple[int, int, int]:
    """`(hits, misses, bytes read)` of a trace under a policy and a budget that holds a step."""
    size = {layer.layer: layer.bytes for layer in trace.layers}
    resident: set[ExpertKey] = set()
    held = hits = misses = bytes_read = 0
    pinned: set[ExpertKey] = set()
    for step in trace.steps:
        policy.routed(step.layer, step.tokens)
        need = size[step.layer]
        for keys in acquisitions(step, need, budget // need):
            pinned.clear()
            pinned.update(keys)
            missing = [key for key in keys if key not in resident]
            for key in missing:
                while held + need > budget:
                    victim = policy.victim(lambda key: key not in pinned)
                    assert victim is not None, "the budget was checked to hold one step"
                    resident.remove(victim)
                    policy.removed(victim)
                    held -= size[victim[0]]
                resident.add(key)
                policy.touched(key)
                held += need
            for key in keys:
                if key not in missing:
                    policy.touched(key)
            misses += len(missing)
            hits += len(keys) - len(missing)
            bytes_read += need * len(missing)
    return hits, misses, bytes_read


def acquisitions(step: TraceStep, size: int, slots: int) -> Sequence[Sequence[ExpertKey]]:
    """What a step asks of the pager, which has `slots` of `size` bytes, at once.

    That is one token's experts, or some of a chunk's.
    """
    layer = step.layer
    if len(step.tokens) == 1:
        return [[(layer, expert) for expert in step.tokens[0]]]
    experts = sorted({expert for row in step.tokens for expert in row})
    return [[(layer, expert) for expert in batch] for batch in plan_batches(experts, size, slots)]
