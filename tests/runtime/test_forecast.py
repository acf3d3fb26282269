"""Forecasts: monotonic, never above the bound, and of the sizes a package really has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evermind_manifests.manifest import GraphStep, StateSpec
from evermind_manifests.package import open_package
from evermind_runtime.forecast import (
    FORMULA,
    GRAPH_RUN_CALLS,
    OVERHEAD_BYTES,
    SKEW,
    Range,
    expected_hit_rate,
    fixed_calls,
    forecast,
    most_hits,
    process_bytes,
    recommended_budget,
    skewed_hit_rate,
)
from evermind_runtime.layers import ExpertLayer
from evermind_runtime.machine import AvailableMemory, Machine
from evermind_runtime.pools import pool_bytes
from evermind_runtime.profile import profile_of
from evermind_runtime.replay import replay
from evermind_runtime.sizes import ModelSizes, StateSizes, manifest_sizes, pooled_sizes
from evermind_runtime.trace import Trace, TraceStep, read_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, structs

OLMOE = Path(__file__).parent.parent / "fixtures" / "traces" / "olmoe_299.jsonl"
MACHINE = Machine(
    disk_rate=1e9,
    disk_how="direct",
    disk_where="here",
    cached_rate=8e9,
    block=2**20,
    readers=1,
    memory_rate=2e10,
    matmul_rate=1e11,
    sha256_rate=1.5e9,
    call_seconds=4e-7,
    threads=2,
    available=AvailableMemory(2**34, "MemAvailable"),
)


@st.composite
def states(draw: st.DrawFn) -> StateSizes:
    sizes = st.integers(0, 10**6)
    return StateSizes(
        fixed=draw(st.integers(0, 10**9)),
        per_token=draw(sizes),
        windows=tuple(draw(st.lists(st.tuples(sizes, st.integers(0, 10**4)), max_size=2))),
        longest=draw(st.none() | st.integers(1, 10**7)),
    )


@st.composite
def models(draw: st.DrawFn) -> ModelSizes:
    experts = draw(st.integers(1, 256))
    top_k = draw(st.integers(1, experts))
    parameters = draw(st.integers(1, 10**8))
    itemsize = draw(st.sampled_from([1, 2, 4]))
    layers = tuple(
        ExpertLayer(layer=at, experts=experts, top_k=top_k, bytes=parameters * itemsize)
        for at in range(draw(st.integers(1, 60)))
    )
    trunk = draw(st.integers(1, 10**10))
    active = draw(st.integers(1, trunk))
    return ModelSizes(
        layers=layers,
        resident_bytes=4 * trunk,
        active_resident_bytes=4 * active,
        state=draw(states()),
        total_parameters=trunk + len(layers) * experts * parameters,
        active_parameters=active + len(layers) * top_k * parameters,
        expert_parameters=len(layers) * experts * parameters,
        graph_runs=len(layers) + 1,
    )


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    rates = [draw(st.floats(1e6, 1e13)) for _ in range(4)]
    return replace(
        MACHINE,
        disk_rate=rates[0],
        memory_rate=rates[1],
        matmul_rate=rates[2],
        sha256_rate=rates[3],
    )


@given(models(), machines(), st.integers(1, 2000), st.data())
@settings(max_examples=60)
def test_more_budget_is_never_worse_and_no_forecast_beats_the_bound(
    sizes: ModelSizes, machine: Machine, prompt: int, data: st.DataObject
) -> None:
    total = sizes.all_expert_bytes
    small, large = sorted(
        (data.draw(st.integers(0, 2 * total)), data.draw(st.integers(0, 2 * total)))
    )
    for policy in ("decayed", "lru"):
        rates = [expected_hit_rate(sizes, budget, policy=policy) for budget in (small, large)]
        for one, other in (
            (rates[0].even, rates[1].even),
            (rates[0].skewed, rates[1].skewed),
            (rates[0].even, rates[0].skewed),
        ):
            assert 0 <= one <= other <= 1
        less, more = (
            forecast(sizes, budget, machine, rate, prompt_tokens=prompt)
            for budget, rate in zip((small, large), rates, strict=True)
        )
        for end in ("even", "skewed"):
            assert getattr(less.tokens_per_second, end) <= getattr(more.tokens_per_second, end)
            assert getattr(less.bytes_per_token, end) >= getattr(more.bytes_per_token, end)
            assert getattr(less.ttft_seconds, end) >= getattr(more.ttft_seconds, end) > 0
            for one in (less, more):
                assert getattr(one.tokens_per_second, end) <= getattr(one.bound, end) * (1 + 1e-9)
        assert less.rss <= more.rss
        assert more.budget <= total


@given(models(), machines(), st.floats(1.1, 100))
@settings(max_examples=30)
def test_a_faster_machine_is_never_slower(
    sizes: ModelSizes, machine: Machine, factor: float
) -> None:
    rate = Range(0.3, 0.6)
    slow = forecast(sizes, sizes.cycle_bytes, machine, rate)
    for field in ("disk_rate", "memory_rate", "matmul_rate", "sha256_rate"):
        faster = replace(machine, **{field: getattr(machine, field) * factor})
        fast = forecast(sizes, sizes.cycle_bytes, faster, rate)
        assert fast.tokens_per_second.even >= slow.tokens_per_second.even
        assert fast.ttft_seconds.even <= slow.ttft_seconds.even


@given(models(), st.integers(0, 2**42))
@settings(max_examples=60)
def test_a_recommended_budget_fits_and_no_expert_more_would(sizes: ModelSizes, memory: int) -> None:
    best = recommended_budget(sizes, memory)
    slot = sizes.layers[0].bytes
    if best is None:
        assert process_bytes(sizes, sizes.least_budget) > int(memory * 0.9) - slot
        return
    assert best % slot == 0
    assert sizes.least_budget <= best <= sizes.all_expert_bytes
    assert process_bytes(sizes, best) <= memory
    if best < sizes.all_expert_bytes:
        assert process_bytes(sizes, best) + slot > memory * 0.9
    verdict = forecast(sizes, best, MACHINE, Range(0, 0), memory=memory).verdict
    assert verdict.startswith("fits")


def test_verdicts() -> None:
    layers = tuple(ExpertLayer(layer=at, experts=8, top_k=2, bytes=2**20) for at in range(4))
    sizes = ModelSizes(layers, 2**20, 2**20, StateSizes(), 2**24, 2**22, 2**23, 5)

    def verdict(budget: int, memory: int = 2**40) -> str:
        return forecast(sizes, budget, MACHINE, Range(0.5, 0.5), memory=memory).verdict

    assert verdict(2 * 2**20 - 1) == "budget too small"
    assert verdict(2 * 2**20) == "fits, but thrashes"
    assert verdict(8 * 2**20 - 1) == "fits, but thrashes"
    assert verdict(8 * 2**20) == "fits"
    assert verdict(32 * 2**20) == "fits, all resident"
    assert verdict(8 * 2**20, memory=OVERHEAD_BYTES + 9 * 2**20 - 1) == "does not fit"
    assert verdict(8 * 2**20, memory=OVERHEAD_BYTES + 9 * 2**20) == "fits"


def test_figures_are_those_of_the_formula() -> None:
    """By hand, from the formula's text."""
    layers = tuple(ExpertLayer(layer=at, experts=4, top_k=1, bytes=10**6) for at in range(2))
    sizes = ModelSizes(layers, 3 * 10**6, 2 * 10**6, StateSizes(), 5 * 10**6, 10**6, 4 * 10**6, 3)
    one = forecast(sizes, 4 * 10**6, MACHINE, Range(0.5, 0.75), prompt_tokens=1000)
    inputs: dict[str, float] = {
        "active_parameters": 10**6,
        "memory_rate": 2e10,
        "disk_rate": 1e9,
        "graph_runs": 3,
        "call_seconds": 4e-7,
        "cycle_bytes": 2 * 10**6,
        "uses": 2,
        "active_bytes": 4 * 10**6,
        "resident_bytes": 3 * 10**6,
        "pooled_from": 0,
        "sha256_rate": 1.5e9,
        "hit_rate": 0.75,
        "more_runs": 0,
        "matmul_rate": 1e11,
        "prompt_tokens": 1000,
        "prompt_expert_bytes": one.prompt_expert_bytes.skewed,
        "prompt_parameters": one.prompt_parameters.skewed,
        "prompt_graph_runs": one.prompt_graph_runs.skewed,
    }
    inputs["fixed_calls"] = eval(FORMULA["fixed_calls"].partition(" (over")[0], {}, inputs)
    for name in ("bytes_per_token", "tokens_per_second", "bound", "load_seconds"):
        inputs[name] = eval(FORMULA[name], {"max": max}, inputs)
    assert one.bytes_per_token.skewed == inputs["bytes_per_token"] == 500_000
    assert one.tokens_per_second.skewed == pytest.approx(inputs["tokens_per_second"])
    assert one.bound.skewed == pytest.approx(inputs["bound"])
    assert one.load_seconds == pytest.approx(inputs["load_seconds"])
    inputs["last_token_seconds"] = 1 / inputs["tokens_per_second"]
    assert one.ttft_seconds.skewed == pytest.approx(
        eval(FORMULA["ttft_seconds"], {"max": max}, inputs)
    )
    # Two chunks; each uses nearly all of the 8 experts, half of which the budget keeps.
    used = 2 * 4 * (1 - (1 - 1 / 4) ** (1000**0.7 / 2))
    assert one.prompt_expert_bytes.skewed == pytest.approx(used * 10**6 * 1.5)
    assert one.prompt_parameters.skewed == pytest.approx(2 * (used * 4 * 10**6 / 8 + 10**6))
    assert one.prompt_graph_runs.skewed == pytest.approx(2 * (used + 2 * 3))
    # What a token reads may be more than 4 bytes for each parameter it multiplies.
    wide = forecast(replace(sizes, active_parameters=1), 8 * 10**6, MACHINE, Range(1, 1))
    inputs |= {"active_parameters": 1, "hit_rate": 1, "bytes_per_token": 0}
    speed = eval(FORMULA["tokens_per_second"], {"max": max}, inputs)
    assert wide.tokens_per_second.even == pytest.approx(speed)
    text, _, where = FORMULA["hit_rate"].partition(", where")
    most = where.partition("most = ")[2].partition(", step")[0]
    # Room for 3 of the 8 experts, 2 of which a token uses in each of 4 layers; then for 9 of 64.
    for experts, budget in ((8, 3), (64, 9)):
        layers = tuple(
            ExpertLayer(layer=at, experts=experts // 4, top_k=2, bytes=1) for at in range(4)
        )
        few = replace(sizes, layers=layers)
        values = {"budget": budget, "cycle_bytes": 8, "step": 8 / 4}
        values = {"share": budget / experts, "odds": SKEW, "most": min(1, eval(most, {}, values))}
        found = expected_hit_rate(few, budget).skewed
        assert found == pytest.approx(eval(text, {"min": min}, values))


def test_the_skew_is_that_of_the_olmoe_trace() -> None:
    trace = read_trace(OLMOE)
    total = 16 * 64
    # The first hundred tokens fill the cache.
    start = replace(trace, steps=trace.steps[: 100 * 16])
    for share in (0.125, 0.25, 0.5, 0.75):
        whole = replay(trace, "decayed", int(total * share))
        begun = replay(start, "decayed", int(total * share))
        needs = whole.hits + whole.misses - begun.hits - begun.misses
        measured = (whole.hits - begun.hits) / needs
        assert skewed_hit_rate(share) == pytest.approx(measured, abs=0.03)


def cyclic(layers: int, experts: int, tokens: int) -> Trace:
    """Every token uses every expert."""
    sizes = [ExpertLayer(layer=at, experts=experts, top_k=experts, bytes=1) for at in range(layers)]
    row = tuple(range(experts))
    return Trace(
        tuple(sizes), tuple(TraceStep(at % layers, (row,)) for at in range(tokens * layers))
    )


@pytest.mark.parametrize(("layers", "experts"), [(2, 4), (12, 1), (4, 3)])
def test_what_a_step_pins_hits_for_no_other_layer(layers: int, experts: int) -> None:
    trace = cyclic(layers, experts, 400)
    sizes = ModelSizes(trace.layers, 1, 1, StateSizes(), 1, 1, 1, layers + 1)
    for budget in range(experts, layers * experts):
        most = most_hits(sizes, budget)
        rate = expected_hit_rate(sizes, budget)
        assert replay(trace, "belady", budget).hit_rate <= most
        # The range holds what the pager does where routing leaves no choice.
        assert rate.skewed == pytest.approx(most)
        assert replay(trace, "decayed", budget).hit_rate == pytest.approx(most, abs=0.02)
    assert expected_hit_rate(sizes, experts) == Range(0, 0)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_no_policy_hits_more_than_steps_leave_room_for(data: st.DataObject) -> None:
    tops = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=5), label="top-k")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    layers = tuple(
        ExpertLayer(layer=at, experts=top_k + 2, top_k=top_k, bytes=1)
        for at, top_k in enumerate(tops)
    )
    steps = [
        TraceStep(layer.layer, (tuple(map(int, rng.permutation(layer.experts)[: layer.top_k])),))
        for _ in range(40)
        for layer in layers
    ]
    sizes = ModelSizes(layers, 1, 1, StateSizes(), 1, 1, 1, 1)
    for budget in range(sizes.least_budget, sizes.cycle_bytes):
        found = replay(Trace(layers, tuple(steps)), "belady", budget).hit_rate
        assert found <= most_hits(sizes, budget) + 1e-9


def test_a_trace_or_a_profile_says_more_than_the_range() -> None:
    trace = read_trace(OLMOE)
    sizes = ModelSizes(trace.layers, 1, 1, StateSizes(), 1, 1, 1, 17)
    budget = 256
    expected = replay(trace, "decayed", budget).hit_rate
    assert expected_hit_rate(sizes, budget, trace=trace) == Range(expected, expected)
    heat = expected_hit_rate(sizes, budget, profile=profile_of(trace))
    assert 0.25 < heat.even <= heat.skewed
    heat_knows = replay(trace, "pinned", budget, profile=profile_of(trace)).hit_rate
    pinned = expected_hit_rate(
        sizes, budget, policy="pinned", trace=trace, profile=profile_of(trace)
    )
    assert pinned == Range(heat_knows, heat_knows) != Range(expected, expected)
    unheeded = expected_hit_rate(sizes, budget, policy="lru", profile=profile_of(trace))
    assert unheeded == expected_hit_rate(sizes, budget, policy="lru")
    assert expected_hit_rate(sizes, 127, policy="lru") == Range(0, 0)
    assert expected_hit_rate(sizes, 1024, policy="lru") == Range(1, 1)


def test_an_even_profile_serves_its_share() -> None:
    layers = tuple(ExpertLayer(layer=at, experts=4, top_k=2, bytes=7) for at in range(2))
    rows = ((0, 1), (2, 3))
    trace = Trace(layers, tuple(TraceStep(at, (row,)) for row in rows for at in range(2)))
    sizes = ModelSizes(layers, 1, 1, StateSizes(), 1, 1, 1, 3)
    assert expected_hit_rate(sizes, 4 * 7, profile=profile_of(trace)).even == pytest.approx(0.5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("case", ["lm_small", "moe_small", "limbic_small"])
def test_sizes_are_those_of_the_package(
    golden_package: Callable[..., Path], case: str, half: bool
) -> None:
    path = golden_package(case, half=half)
    with open_package(path) as package:
        manifest = package.manifest
        sizes = manifest_sizes(manifest)
        shards = [package.read_shard(shard.layer, shard.expert) for shard in manifest.shards]
    assert sizes.all_expert_bytes == sum(shard.bytes for shard in manifest.shards)
    assert sizes.cycle_bytes == sum(
        layer.top_k * manifest.kinds[layer.kind].bytes for layer in manifest.layers
    )
    assert sizes.expert_parameters == sum(
        shard.array(name).size for shard in shards for name in shard.views
    )
    assert sizes.total_parameters == manifest.parameters.total
    resident = (path / str(manifest.resident)).stat().st_size
    assert sizes.resident_bytes == resident
    # Float32, and a header: what is left of the parameters lies in it.
    trunk = sizes.total_parameters - sizes.expert_parameters
    assert 4 * trunk <= resident <= 4 * trunk + 4096
    assert sizes.active_resident_bytes <= resident
    assert sizes.graph_runs == len(manifest.plan.decode)


def test_experts_that_decode_one_by_one_are_runs_of_their_own(
    golden_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_package(golden_package("lm_small")) as package:
        manifest = package.manifest
    fused = manifest_sizes(manifest)
    monkeypatch.setattr("evermind_runtime.open_engine.ONE_BY_ONE_BYTES", 1)
    alone = manifest_sizes(manifest)
    graphs = sum(isinstance(step, GraphStep) for step in manifest.plan.prefill)
    assert (fused.more_runs, fused.graph_runs) == (0, len(manifest.plan.decode))
    assert alone.graph_runs + alone.more_runs == graphs + alone.uses
    assert fixed_calls(alone) - fixed_calls(fused) == alone.more_runs * GRAPH_RUN_CALLS > 0
    assert pooled_sizes(manifest, alone).more_runs == 0


def test_pools_are_filled_when_the_package_is_opened(
    golden_package: Callable[..., Path],
) -> None:
    with open_package(golden_package("lm_small", half=True)) as package:
        manifest = package.manifest
    stored = manifest_sizes(manifest)
    pooled = pooled_sizes(manifest, stored)
    assert pooled.all_expert_bytes == 4 * stored.expert_parameters == pool_bytes(manifest)
    assert pooled.pooled_from == stored.all_expert_bytes
    one, other = (
        forecast(sizes, sizes.all_expert_bytes, MACHINE, Range(1, 1)) for sizes in (stored, pooled)
    )
    assert other.load_seconds - one.load_seconds == pytest.approx(
        stored.all_expert_bytes * (1 / MACHINE.disk_rate + 1 / MACHINE.sha256_rate)
    )
    assert other.ttft_seconds.even < one.ttft_seconds.even
    assert other.rss > one.rss


@given(states(), st.integers(0, 10**13))
def test_the_longest_context_is_what_just_fits(state: StateSizes, room: int) -> None:
    tokens = state.tokens(room)
    if tokens is None:
        assert (state.longest, state.per_token) == (None, 0)
        assert state.fixed + state.bounded <= room
    elif state.bytes(0) > room:
        assert tokens == 0
    else:
        assert state.bytes(tokens) <= room
        assert tokens == state.longest or state.bytes(tokens + 1) > room


def test_a_window_bounds_what_a_context_takes(golden_package: Callable[..., Path]) -> None:
    with open_package(golden_package("lm_small")) as package:
        manifest = package.manifest
    rows = StateSpec(dtype="f32", shape=(1, 2, "C", 8), length="past", limit=50_000)
    bounded = structs.replace(rows, length="past.128", limit=UNSET, window=128)
    more = {"full": rows, "one": bounded, "other": bounded}
    plan = structs.replace(manifest.plan, state={**manifest.plan.state, **more})
    sizes = manifest_sizes(structs.replace(manifest, plan=plan), context=10**6)
    assert sizes.context == sizes.state.longest == 50_000
    row = 2 * 8 * 4
    assert sizes.state.windows == ((2 * row, 128 - 1 + 64),)
    assert sizes.state_bytes == sizes.state.fixed + row * 50_000 + 2 * row * 191
    assert sizes.state.bytes(100) == sizes.state.fixed + 3 * row * 100
    base = process_bytes(sizes, 0) - 2 * sizes.state_bytes
    for tokens in (0, 1, 150, 40_000, 60_000):
        memory = base + 2 * sizes.state.bytes(tokens)
        assert forecast(sizes, 0, MACHINE, Range(0, 0), memory=memory).longest_context == min(
            tokens, 50_000
        )
    assert forecast(sizes, 0, MACHINE, Range(0, 0), memory=1).longest_context == 0


def test_a_state_that_grows_is_counted_for_the_context(
    golden_package: Callable[..., Path],
) -> None:
    with open_package(golden_package("lm_small")) as package:
        manifest = package.manifest
    fixed = manifest_sizes(manifest).state_bytes
    kept = StateSpec(dtype="f32", shape=("C", 2, 8))
    for limit, context, rows in ((UNSET, 1000, 1000), (300, 1000, 300), (5000, 1000, 1000)):
        spec = structs.replace(kept, limit=limit)
        plan = structs.replace(manifest.plan, state={**manifest.plan.state, "keys": spec})
        grown = manifest_sizes(structs.replace(manifest, plan=plan), context=context)
        assert grown.state_bytes == fixed + rows * 2 * 8 * 4
