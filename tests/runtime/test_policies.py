"""Policies alone: what they promise, against naive references, and their bookkeeping's size."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence
from contextlib import suppress

import pytest
from evermind_manifests.errors import InputError
from evermind_runtime.choose_policy import make_policy, pinned_keys
from evermind_runtime.layers import ExpertLayer
from evermind_runtime.policies import (
    DecayedPolicy,
    ExpertKey,
    LfuPolicy,
    LruPolicy,
    PinnedPolicy,
    Policy,
)
from evermind_runtime.policies.decayed import HALF_LIFE
from evermind_runtime.profile import SCHEMA, LayerProfile, Profile
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS, EXPERTS = 3, 6


def online_policies() -> list[Policy]:
    pinned = [(layer, expert) for layer in range(LAYERS) for expert in (0, 1)]
    return [
        DecayedPolicy(range(LAYERS)),
        LruPolicy(),
        LfuPolicy(),
        PinnedPolicy(pinned, DecayedPolicy(range(LAYERS))),
    ]


experts = st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2, unique=True)
steps = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.lists(experts, min_size=1, max_size=4)), max_size=40
)


@pytest.mark.parametrize("which", range(4))
def test_resync_mends_what_ctrl_c_broke(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    policy = online_policies()[which]
    keys = [(0, expert) for expert in (0, 3, 4)]
    policy.routed(0, [[0, 3, 4]])
    with monkeypatch.context() as patch:
        # Between noting that an expert stands in the heap and putting it there.
        patch.setattr(heapq, "heappush", interrupted)
        for key in keys:
            with suppress(KeyboardInterrupt):
                policy.touched(key)
        with suppress(KeyboardInterrupt):
            policy.routed(0, [[1]])
    policy.touched((1, 3))
    policy.removed((1, 3))
    policy.resync(keys)
    left = set(keys)
    while left:
        victim = policy.victim(left.__contains__)
        assert victim in left
        policy.removed(victim)
        left.remove(victim)
    assert policy.victim(lambda _: True) is None


@settings(max_examples=60, deadline=None)
@given(steps=steps, seed=st.integers(0, 2**16), which=st.integers(0, 3))
def test_a_victim_is_resident_and_evictable_and_found_if_there_is_one(
    steps: list[tuple[int, list[list[int]]]], seed: int, which: int
) -> None:
    policy, rng = online_policies()[which], random.Random(seed)
    resident: set[ExpertKey] = set()
    for layer, tokens in steps:
        policy.routed(layer, tokens)
        for expert in sorted({e for row in tokens for e in row}):
            evictable = {key for key in sorted(resident) if rng.random() < 0.5}
            victim = policy.victim(evictable.__contains__)
            assert (victim in evictable) if evictable else victim is None
            if victim:
                resident.remove(victim)
                policy.removed(victim)
            resident.add((layer, expert))
            policy.touched((layer, expert))
    assert policy.victim(lambda key: False) is None
    while resident:
        victim = policy.victim(lambda key: True)
        assert victim is not None
        resident.remove(victim)
        policy.removed(victim)
    assert policy.victim(lambda key: True) is None


class NaiveDecayed:
    """The default policy's rule, word for word, over everything at every call."""

    def __init__(self, layers: int) -> None:
        self.count: dict[ExpertKey, float] = {}
        self.latest: dict[int, Sequence[int]] = {}
        self.layers, self.running = layers, layers - 1

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        self.running = layer
        for row in tokens:
            for key in self.count:
                if key[0] == layer:
                    self.count[key] *= 0.5 ** (1 / HALF_LIFE)
            for expert in row:
                self.count[layer, expert] = self.count.get((layer, expert), 0.0) + 1
        self.latest[layer] = tokens[-1]

    def value(self, key: ExpertKey) -> float:
        layer, expert = key
        value = self.count[key] * (4 if expert in self.latest[layer] else 1)
        turns_away = (layer - self.running - 1) % self.layers
        return value * 0.5 ** (turns_away / self.layers)


@settings(max_examples=60, deadline=None)
@given(steps=steps, capacity=st.integers(2, LAYERS * EXPERTS - 1), seed=st.integers(0, 2**16))
def test_the_default_gives_up_what_its_rule_says(
    steps: list[tuple[int, list[list[int]]]], capacity: int, seed: int
) -> None:
    policy, naive, rng = DecayedPolicy(range(LAYERS)), NaiveDecayed(LAYERS), random.Random(seed)
    resident: set[ExpertKey] = set()
    for layer, tokens in steps:
        step = tokens[:1]
        policy.routed(layer, step)
        naive.routed(layer, step)
        needed = {(layer, expert) for expert in step[0]}
        busy = {key for key in sorted(resident) if rng.random() < 0.1}
        for key in sorted(needed - resident):
            free = resident - needed - busy
            if len(resident) >= capacity and free:
                victim = policy.victim(free.__contains__)
                assert victim is not None
                least = min(map(naive.value, free))
                assert math.isclose(naive.value(victim), least, rel_tol=1e-9)
                resident.remove(victim)
                policy.removed(victim)
            resident.add(key)
            policy.touched(key)
        for key in needed:
            policy.touched(key)


def test_a_chunk_keeps_what_it_has_yet_to_come_to() -> None:
    policy = DecayedPolicy([0])
    policy.routed(0, [[4, 5]])
    policy.touched((0, 4))
    policy.touched((0, 5))
    policy.routed(0, [[1, 5], [2, 3]])
    policy.touched((0, 1))
    # 4 has the colder count of the two that were there; 5 is still to come.
    assert policy.victim(lambda key: key != (0, 1)) == (0, 4)
    policy.removed((0, 4))
    # Only when nothing else is left: the latest token's own, then those awaited.
    assert policy.victim(lambda key: key != (0, 1)) == (0, 5)
    policy.touched((0, 5))
    policy.touched((0, 2))
    assert policy.victim(lambda key: True) == (0, 1)


def test_a_prompt_counts_by_its_last_tokens() -> None:
    """However long a prompt of another sequence was, what was hot before stays known."""
    prompt = [[2, 3]] * 5000
    policy = DecayedPolicy([0])
    for _ in range(100):
        policy.routed(0, [[0, 1]])
    policy.routed(0, prompt)
    policy.routed(0, [[4, 5]])
    for expert in (0, 6):
        policy.touched((0, expert))
    # 0 keeps a count; 6 never had one.
    assert policy.victim(lambda key: True) == (0, 6)
    policy.removed((0, 6))
    assert policy.victim(lambda key: True) == (0, 0)


@pytest.mark.parametrize("which", range(4))
def test_bookkeeping_does_not_grow_without_evictions(which: int) -> None:
    """A model whose experts all fit runs for ever."""
    policy, rng = online_policies()[which], random.Random(0)
    for step in range(3000):
        tokens = [rng.sample(range(EXPERTS), 2)]
        policy.routed(step % LAYERS, tokens)
        for expert in tokens[0]:
            policy.touched((step % LAYERS, expert))
    assert _held(policy) < 60 * LAYERS * EXPERTS


def _held(thing: object) -> int:
    """Items in all containers reachable from a policy."""
    if isinstance(thing, dict):
        return len(thing) + sum(map(_held, thing.values()))
    if isinstance(thing, (list, tuple, set, frozenset)):
        return len(thing) + sum(map(_held, thing))
    return sum(map(_held, vars(thing).values())) if hasattr(thing, "__dict__") else 0


def test_pinned_keys_go_last_and_the_coldest_first() -> None:
    policy = PinnedPolicy([(0, 1), (0, 0)], LruPolicy())
    for expert in (1, 0, 2, 3):
        policy.touched((0, expert))
    order = []
    while (key := policy.victim(lambda key: True)) is not None:
        order.append(key[1])
        policy.removed(key)
    assert order == [2, 3, 0, 1]


SIZES = (
    ExpertLayer(layer=0, experts=4, top_k=2, bytes=100),
    ExpertLayer(layer=1, experts=3, top_k=1, bytes=700),
)
HEAT = Profile(SCHEMA, (LayerProfile(0, (50, 0, 10, 40)), LayerProfile(1, (2, 9, 1))))


@pytest.mark.parametrize("budget", range(700, 2600, 50))
def test_pinned_keys_leave_a_working_set(budget: int) -> None:
    keys = pinned_keys(SIZES, budget, HEAT)
    held = sum(SIZES[layer].bytes for layer, _ in keys)
    assert held <= max(0, budget - 700)
    hottest = [(1, 1), (0, 0), (0, 3), (1, 0), (0, 2), (1, 2)]
    assert keys == hottest[: len(keys)]
    assert keys or budget < 700 + 2 * 700


def test_policies_are_made_by_name() -> None:
    assert isinstance(make_policy("decayed", SIZES, 900), DecayedPolicy)
    assert isinstance(make_policy("lru", SIZES, 900), LruPolicy)
    assert isinstance(make_policy("pinned", SIZES, 900, HEAT), PinnedPolicy)
    with pytest.raises(InputError, match="needs a routing profile"):
        make_policy("pinned", SIZES, 900)
    with pytest.raises(InputError, match="only the policy 'pinned'"):
        make_policy("lru", SIZES, 900, HEAT)
    with pytest.raises(InputError, match="expected one of decayed, lru, pinned, found 'fifo'"):
        make_policy("fifo", SIZES, 900)  # type: ignore[arg-type]


def test_layers_of_any_number_in_any_order() -> None:
    """Layers are known by their numbers, turns by their order."""
    order = (7, 2, 90)
    policy = DecayedPolicy(order)
    for layer, expert in itertools.product(order, range(2)):
        policy.routed(layer, [[expert]])
        policy.touched((layer, expert))
    # Every count is alike; 90 has just run, so 2 is the last of the others to run again.
    victim = policy.victim(lambda key: key[0] != 90)
    assert victim == (2, 0)
