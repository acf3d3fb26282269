"""Experts large enough for reader threads: the same bits, the budget, faults."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from evermind_manifests.errors import (
    IntegrityError,
    ShardDigestError,
    TruncatedError,
)
from evermind_runtime import pager
from evermind_runtime.replay import replay
from evermind_runtime.shard_reader import ShardReader
from evermind_runtime.trace import read_trace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.large_experts import EXPERTS, LAYERS, TOKENS, TOP_K, Read, load, watch
from tests.runtime.paging import check_idle, poll, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")


def slot_size(large_package: Path) -> int:
    with load(large_package) as model:
        return model.budget // (LAYERS * EXPERTS)


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_paged_runs_give_the_same_bits(
    large_package: Path, large_results: dict[str, Any], io: Any, count: int
) -> None:
    with load(large_package, budget=count * slot_size(large_package), io=io) as model:
        for _ in range(2):
            for steps in ("prefill", "decode"):
                assert same_bits(model.forward(TOKENS, steps=steps), large_results[steps])  # type: ignore[arg-type]
        stats = model.stats()
        assert stats.io == io
        assert stats.peak_resident_expert_bytes <= model.budget
        assert stats.wait_seconds > 0
        check_idle(model)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(tokens=st.lists(st.integers(0, 39), min_size=1, max_size=20), count=st.integers(2, 12),
       steps=st.sampled_from(["prefill", "decode"]), seed=st.integers(0, 99))  # fmt: skip
def test_slow_and_uneven_reads_change_no_bit(
    large_package: Path, tokens: list[int], count: int, steps: Any, seed: int
) -> None:
    delays = random.Random(seed)

    def slow(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        time.sleep(delays.choice([0, 0, 0.002]))
        read(path, offset, buffer)

    inputs = {"tokens": tokens}
    with (
        load(large_package) as whole,
        load(large_package, budget=count * slot_size(large_package)) as model,
    ):
        watch(model, slow)
        assert same_bits(model.forward(inputs, steps=steps), whole.forward(inputs, steps=steps))
        held = sum(slot.bytes for slot in model._pager.slots.all)
        assert held <= model.stats().peak_resident_expert_bytes <= model.budget
        check_idle(model)


@pytest.mark.parametrize("policy", ["decayed", "lru"])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_replay_counts_what_large_experts_cost(
    large_package: Path, tmp_path: Path, policy: Any, count: int
) -> None:
    """Of tokens that are decoded, whoever read what they missed."""
    budget = count * slot_size(large_package)
    with load(large_package, budget=budget, policy=policy, verify="never", guess="off") as model:
        model.trace(tmp_path / "t.jsonl")
        model.forward(TOKENS, steps="decode")
        stats = model.stats()
    found = replay(read_trace(tmp_path / "t.jsonl"), policy, budget)
    assert (stats.expert_hits, stats.expert_misses) == (found.hits, found.misses)
    assert 0 < found.misses < LAYERS * TOP_K * len(TOKENS["tokens"]) or count == 2


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12])
def test_a_chunk_reads_each_expert_once(large_package: Path, count: int) -> None:
    reads: Counter[str] = Counter()

    def counting(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        reads[path] += 1
        read(path, offset, buffer)

    with load(large_package, budget=count * slot_size(large_package)) as model:
        model.forward({"tokens": [7] * 3})
        watch(model, counting)
        outputs = model.forward(TOKENS)
        routed = sum(len(np.unique(outputs[f"ids.{layer}"])) for layer in range(LAYERS))
        assert sum(reads.values()) <= routed
        assert set(reads.values()) == {1}


def test_the_experts_of_a_token_are_read_at_the_same_time(large_package: Path) -> None:
    """Neither read ends before the other has begun."""
    begun: Counter[str] = Counter()

    def together(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        layer = path.rpartition("/")[0]
        begun[layer] += 1
        poll(lambda: begun[layer] == TOP_K)
        read(path, offset, buffer)

    with load(large_package) as model:
        watch(model, together)
        model.forward({"tokens": [1]}, steps="decode")
        assert model.stats().expert_misses == LAYERS * TOP_K


def test_what_the_page_cache_lacks_is_left_to_the_readers(
    large_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three, the first is copied; the others are read at the same time, by two threads. Who
    waited for the last of them before that was known gets it too."""
    begun: list[str] = []
    found: list[bytes] = []
    waits = threading.Thread(target=lambda: found.append(content(0, 2)), daemon=True)

    def content(layer: int, expert: int) -> bytes:
        with model._pager.acquire(layer, [expert]) as slots, slots[0].filling() as view:
            return bytes(view)

    def read_once(self: ShardReader, shard: Any, *rest: Any) -> int:
        if shard.expert:
            return 0
        job = model._pager.slots.loading[0, 2]
        assert job.keys == [(0, 0), (0, 1), (0, 2)]
        waits.start()
        poll(lambda: job.gates)
        return honest(self, shard, *rest)

    def together(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        begun.append(path)
        poll(lambda: len(begun) == 2)
        read(path, offset, buffer)

    honest = ShardReader._read_once
    with load(large_package, verify="never") as model:
        right = content(0, 2)
    with load(large_package, verify="never") as model:
        watch(model, together)
        monkeypatch.setattr(ShardReader, "_read_once", read_once)
        with model._pager.acquire(0, [0, 1, 2]):
            poll(lambda: not waits.is_alive())
        assert found == [right]
        assert model.stats().bytes_read == 3 * model.manifest.shards[0].bytes
        check_idle(model)


def lacking(monkeypatch: pytest.MonkeyPatch, expert: int, failing: Collection[int] = ()) -> None:
    """Have the page cache lack this expert, and reads that ask it for those that fail do so."""

    def read_once(self: ShardReader, shard: Any, *rest: Any) -> int:
        if shard.expert in failing:
            raise IntegrityError("made for a test")
        return 0 if shard.expert == expert else honest(self, shard, *rest)

    honest = ShardReader._read_once
    monkeypatch.setattr(ShardReader, "_read_once", read_once)


def test_a_read_of_the_disk_is_counted_apart_from_those_before_it(
    large_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many that guesses would end with as many that the page cache has, it lacks one."""
    monkeypatch.setattr(pager, "_CACHED_READS", EXPERTS)
    with load(large_package, budget="50%", verify="never") as model:
        with monkeypatch.context() as cold:
            lacking(cold, EXPERTS - 1)
            for layer in range(LAYERS):
                with model._pager.acquire(layer, range(EXPERTS)):
                    assert model._pager.guesses(layer)
        lacking(monkeypatch, EXPERTS)
        with model._pager.acquire(0, range(EXPERTS)):
            assert not model._pager.guesses(0)


def test_a_guess_that_a_step_joins_is_read_though_the_step_fails(
    large_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was another's, and no reader had begun with it."""
    with load(large_package, budget="50%", verify="never") as model:
        readers = model._pager._readers
        assert readers is not None
        with monkeypatch.context() as asleep:
            asleep.setattr(readers, "wake", lambda work: None)
            other = threading.Thread(target=model._pager.guess, args=(0, [5]), daemon=True)
            other.start()
            poll(lambda: not other.is_alive())
        assert model._pager.slots.loading
        lacking(monkeypatch, 5, failing=[3])
        with pytest.raises(IntegrityError), model._pager.acquire(0, [3, 5]):
            pass
        check_idle(model)
        assert model._pager.slots.resident.keys() == {(0, 5)}
        assert model.stats().bytes_read == model.manifest.shards[0].bytes


def test_what_readers_read_counts_as_used_in_the_order_asked_for(
    large_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last is read first. What was there counts as used after all that was not."""
    asked = [4, 1, 0, 3]

    def backwards(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        resident = model._pager.slots.resident
        poll(lambda: "e0003" in path or (0, 3) in resident)
        read(path, offset, buffer)

    with load(large_package, budget="84%", policy="lru", verify="never") as model:
        with model._pager.acquire(0, [1]):
            pass
        watch(model, backwards)
        monkeypatch.setattr(ShardReader, "_read_once", lambda *_: 0)
        with model._pager.acquire(0, asked):
            order = [expert for _, expert in model._pager._policy._order]  # type: ignore[attr-defined]
    assert order == [4, 0, 3, 1]


def test_a_chunk_reads_ahead_while_an_expert_runs(large_package: Path) -> None:
    """The next two come while the first is still in use, and no more than two."""
    with load(large_package, budget="50%") as model:
        table = model._pager.slots
        with closing(model._pager.stream(0, range(EXPERTS))) as stream:
            next(stream)
            poll(lambda: len(table.resident) == 3)
            assert table.resident.keys() == {(0, 0), (0, 1), (0, 2)}
            assert not table.loading
            assert table.pinned == 1
        check_idle(model)


# Faults.


@pytest.mark.parametrize("steps", ["prefill", "decode"])
@pytest.mark.parametrize("fails", [1, 2, 3, 5, 9])
def test_an_error_in_any_read_reaches_the_caller(
    large_package: Path, large_results: dict[str, Any], steps: Any, fails: int
) -> None:
    reads = iter(range(1, 1000))
    broken: set[str] = set()

    def failing(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        if next(reads) == fails:
            broken.add(path)
        if path in broken:
            buffer[: len(buffer) // 2] = b"\xaa" * (len(buffer) // 2)
            raise TruncatedError(f"{path}: made for a test")
        read(path, offset, buffer)

    with load(large_package, budget="50%") as model:
        watch(model, failing)
        with pytest.raises(TruncatedError, match="made for a test"):
            model.forward(TOKENS, steps=steps)
        check_idle(model)
        broken.clear()
        assert same_bits(model.forward(TOKENS, steps=steps), large_results[steps])


def test_what_a_reader_fails_to_read_others_try_again(
    large_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was left to a reader by one who needs it, and another waits for it: only one fails."""
    begun: list[str] = []
    found: list[bytes] = []

    def content() -> bytes:
        with model._pager.acquire(0, [1]) as slots, slots[0].filling() as view:
            return bytes(view)

    def failing(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        begun.append(path)
        if "e0000" in path:
            poll(lambda: len(begun) == 2)
        elif len(begun) == 2:
            job = model._pager.slots.loading[0, 1]
            waits.start()
            poll(lambda: len(job.gates) == 2)
            raise IntegrityError("made for a test")
        read(path, offset, buffer)

    with load(large_package, verify="never") as model:
        right = content()
    monkeypatch.setattr(ShardReader, "_read_once", lambda *_: 0)
    waits = threading.Thread(target=lambda: found.append(content()), daemon=True)
    with load(large_package, verify="never") as model:
        watch(model, failing)
        with pytest.raises(IntegrityError), model._pager.acquire(0, [0, 1]):
            pass
        poll(lambda: not waits.is_alive())
        assert found == [right]
        assert len(begun) == 3
        check_idle(model)


def test_a_wrong_digest_is_read_again_once_and_then_named(large_package: Path) -> None:
    reads: Counter[str] = Counter()

    def wrong(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        reads[path] += 1
        read(path, offset, buffer)
        buffer[-1] ^= 1

    with load(large_package, budget="50%") as model:
        watch(model, wrong)
        with pytest.raises(ShardDigestError, match="layer 0"):
            model.forward(TOKENS)
        check_idle(model)
        assert set(reads.values()) == {2}
        assert not model._pager.slots.resident


def test_threads_under_a_tiny_budget_with_a_failing_store(
    large_package: Path, large_results: dict[str, Any]
) -> None:
    """Requests that fail fail by themselves: the others' bits are right, and nothing is lost."""
    chance = random.Random(3)
    outcomes: list[str] = []

    def moody(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        time.sleep(chance.choice([0, 0, 0.001]))
        if chance.random() < 0.02:
            raise IntegrityError(f"{path}: made for a test")
        read(path, offset, buffer)

    with load(large_package, budget=5 * slot_size(large_package), verify="never") as model:
        watch(model, moody)

        def work(steps: Literal["prefill", "decode"]) -> None:
            for _ in range(4):
                try:
                    right = same_bits(model.forward(TOKENS, steps=steps), large_results[steps])
                    outcomes.append("right" if right else "wrong")
                except IntegrityError:
                    outcomes.append("failed")

        threads = [
            threading.Thread(target=work, args=(steps,), daemon=True)
            for steps in ("prefill", "decode") * 3
        ]
        for thread in threads:
            thread.start()
        poll(lambda: not any(thread.is_alive() for thread in threads))
        assert len(outcomes) == 24
        assert set(outcomes) <= {"right", "failed"}
        check_idle(model)
        assert model.stats().peak_resident_expert_bytes <= model.budget
