"""Experts large enough for reader threads: the same bits, the budget, faults and Ctrl-C."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import (
    ClosedError,
    ForkedError,
    InputError,
    IntegrityError,
    ShardDigestError,
    TruncatedError,
)
from evermind_runtime import jobs, pager, slots
from evermind_runtime.replay import replay
from evermind_runtime.shard_reader import ShardReader
from evermind_runtime.trace import read_trace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.packages import export, random_source
from tests.runtime.paging import check_idle, poll, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

LAYERS, EXPERTS, TOP_K = 2, 6, 2
CONFIG = {
    "vocabSize": 40,
    "dModel": 256,
    "numLayers": LAYERS,
    "hiddenDim": 512,
    "numExperts": EXPERTS,
    "topK": TOP_K,
}
TOKENS = {"tokens": list(range(40))}
load = partial(em.load, plan="paged")
Read = Callable[[str, int, memoryview], None]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 experts of 516 KiB."""
    return export(random_source("evermind-lm", CONFIG), tmp_path_factory.mktemp("large") / "lm")


@pytest.fixture(scope="module")
def expected(package: Path) -> dict[str, Any]:
    with load(package) as model:
        return {steps: model.forward(TOKENS, steps=steps) for steps in ("prefill", "decode")}  # type: ignore[arg-type]


def slot_size(package: Path) -> int:
    with load(package) as model:
        return model.budget // (LAYERS * EXPERTS)


def watch(model: em.Model, around: Callable[[Read, str, int, memoryview], None]) -> None:
    """Have `around` do the store's reads."""
    store = model._package.store
    honest = store.read_into
    store.read_into = lambda *read: around(honest, *read)  # type: ignore[method-assign]


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_paged_runs_give_the_same_bits(
    package: Path, expected: dict[str, Any], io: Any, count: int
) -> None:
    with load(package, budget=count * slot_size(package), io=io) as model:
        for _ in range(2):
            for steps in ("prefill", "decode"):
                assert same_bits(model.forward(TOKENS, steps=steps), expected[steps])  # type: ignore[arg-type]
        stats = model.stats()
        assert stats.io == io
        assert stats.peak_resident_expert_bytes <= model.budget
        assert stats.wait_seconds > 0
        check_idle(model)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(tokens=st.lists(st.integers(0, 39), min_size=1, max_size=20), count=st.integers(2, 12),
       steps=st.sampled_from(["prefill", "decode"]), seed=st.integers(0, 99))  # fmt: skip
def test_slow_and_uneven_reads_change_no_bit(
    package: Path, tokens: list[int], count: int, steps: Any, seed: int
) -> None:
    delays = random.Random(seed)

    def slow(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        time.sleep(delays.choice([0, 0, 0.002]))
        read(path, offset, buffer)

    inputs = {"tokens": tokens}
    with load(package) as whole, load(package, budget=count * slot_size(package)) as model:
        watch(model, slow)
        assert same_bits(model.forward(inputs, steps=steps), whole.forward(inputs, steps=steps))
        held = sum(slot.bytes for slot in model._pager.slots.all)
        assert held <= model.stats().peak_resident_expert_bytes <= model.budget
        check_idle(model)


@pytest.mark.parametrize("policy", ["decayed", "lru"])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_replay_counts_what_large_experts_cost(
    package: Path, tmp_path: Path, policy: Any, count: int
) -> None:
    """Of tokens that are decoded, whoever read what they missed."""
    budget = count * slot_size(package)
    with load(package, budget=budget, policy=policy, verify="never", guess="off") as model:
        model.trace(tmp_path / "t.jsonl")
        model.forward(TOKENS, steps="decode")
        stats = model.stats()
    found = replay(read_trace(tmp_path / "t.jsonl"), policy, budget)
    assert (stats.expert_hits, stats.expert_misses) == (found.hits, found.misses)
    assert 0 < found.misses < LAYERS * TOP_K * len(TOKENS["tokens"]) or count == 2


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12])
def test_a_chunk_reads_each_expert_once(package: Path, count: int) -> None:
    reads: Counter[str] = Counter()

    def counting(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        reads[path] += 1
        read(path, offset, buffer)

    with load(package, budget=count * slot_size(package)) as model:
        model.forward({"tokens": [7] * 3})
        watch(model, counting)
        outputs = model.forward(TOKENS)
        routed = sum(len(np.unique(outputs[f"ids.{layer}"])) for layer in range(LAYERS))
        assert sum(reads.values()) <= routed
        assert set(reads.values()) == {1}


def test_the_experts_of_a_token_are_read_at_the_same_time(package: Path) -> None:
    """Neither read ends before the other has begun."""
    begun: Counter[str] = Counter()

    def together(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        layer = path.rpartition("/")[0]
        begun[layer] += 1
        poll(lambda: begun[layer] == TOP_K)
        read(path, offset, buffer)

    with load(package) as model:
        watch(model, together)
        model.forward({"tokens": [1]}, steps="decode")
        assert model.stats().expert_misses == LAYERS * TOP_K


def test_what_the_page_cache_lacks_is_left_to_the_readers(
    package: Path, monkeypatch: pytest.MonkeyPatch
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
    with load(package, verify="never") as model:
        right = content(0, 2)
    with load(package, verify="never") as model:
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
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many that guesses would end with as many that the page cache has, it lacks one."""
    monkeypatch.setattr(pager, "_CACHED_READS", EXPERTS)
    with load(package, budget="50%", verify="never") as model:
        with monkeypatch.context() as cold:
            lacking(cold, EXPERTS - 1)
            for layer in range(LAYERS):
                with model._pager.acquire(layer, range(EXPERTS)):
                    assert model._pager.guesses(layer)
        lacking(monkeypatch, EXPERTS)
        with model._pager.acquire(0, range(EXPERTS)):
            assert not model._pager.guesses(0)


def test_a_guess_that_a_step_joins_is_read_though_the_step_fails(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was another's, and no reader had begun with it."""
    with load(package, budget="50%", verify="never") as model:
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
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last is read first. What was there counts as used after all that was not."""
    asked = [4, 1, 0, 3]

    def backwards(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        resident = model._pager.slots.resident
        poll(lambda: "e0003" in path or (0, 3) in resident)
        read(path, offset, buffer)

    with load(package, budget="84%", policy="lru", verify="never") as model:
        with model._pager.acquire(0, [1]):
            pass
        watch(model, backwards)
        monkeypatch.setattr(ShardReader, "_read_once", lambda *_: 0)
        with model._pager.acquire(0, asked):
            order = [expert for _, expert in model._pager._policy._order]  # type: ignore[attr-defined]
    assert order == [4, 0, 3, 1]


def test_a_chunk_reads_ahead_while_an_expert_runs(package: Path) -> None:
    """The next two come while the first is still in use, and no more than two."""
    with load(package, budget="50%") as model:
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
    package: Path, expected: dict[str, Any], steps: Any, fails: int
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

    with load(package, budget="50%") as model:
        watch(model, failing)
        with pytest.raises(TruncatedError, match="made for a test"):
            model.forward(TOKENS, steps=steps)
        check_idle(model)
        broken.clear()
        assert same_bits(model.forward(TOKENS, steps=steps), expected[steps])


def test_what_a_reader_fails_to_read_others_try_again(
    package: Path, monkeypatch: pytest.MonkeyPatch
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

    with load(package, verify="never") as model:
        right = content()
    monkeypatch.setattr(ShardReader, "_read_once", lambda *_: 0)
    waits = threading.Thread(target=lambda: found.append(content()), daemon=True)
    with load(package, verify="never") as model:
        watch(model, failing)
        with pytest.raises(IntegrityError), model._pager.acquire(0, [0, 1]):
            pass
        poll(lambda: not waits.is_alive())
        assert found == [right]
        assert len(begun) == 3
        check_idle(model)


def test_a_wrong_digest_is_read_again_once_and_then_named(package: Path) -> None:
    reads: Counter[str] = Counter()

    def wrong(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        reads[path] += 1
        read(path, offset, buffer)
        buffer[-1] ^= 1

    with load(package, budget="50%") as model:
        watch(model, wrong)
        with pytest.raises(ShardDigestError, match="layer 0"):
            model.forward(TOKENS)
        check_idle(model)
        assert set(reads.values()) == {2}
        assert not model._pager.slots.resident


def test_threads_under_a_tiny_budget_with_a_failing_store(
    package: Path, expected: dict[str, Any]
) -> None:
    """Requests that fail fail by themselves: the others' bits are right, and nothing is lost."""
    chance = random.Random(3)
    outcomes: list[str] = []

    def moody(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        time.sleep(chance.choice([0, 0, 0.001]))
        if chance.random() < 0.02:
            raise IntegrityError(f"{path}: made for a test")
        read(path, offset, buffer)

    with load(package, budget=5 * slot_size(package), verify="never") as model:
        watch(model, moody)

        def work(steps: Literal["prefill", "decode"]) -> None:
            for _ in range(4):
                try:
                    right = same_bits(model.forward(TOKENS, steps=steps), expected[steps])
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


# Forks, Ctrl-C and close.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_its_parents_experts_alone(
    package: Path, expected: dict[str, Any]
) -> None:
    with load(package, budget="34%") as model:
        model.forward(TOKENS)
        slot = next(iter(model._pager.slots.resident.values()))
        with slot.filling() as view:
            before = bytes(view)
            child = os.fork()
            if not child:
                view[:] = bytes(len(view))
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert bytes(view) == before
        assert same_bits(model.forward(TOKENS), expected["prefill"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_cannot_use_its_parents_model(
    package: Path, expected: dict[str, Any]
) -> None:
    """Its readers are not there; what it loads itself has its own."""
    told, tell = os.pipe()
    with load(package, budget="34%") as model:
        model.forward(TOKENS)
        child = os.fork()
        if not child:
            said = []
            try:
                for use in (
                    lambda: model.forward(TOKENS),
                    lambda: model.decode(TOKENS, model.new_state()),
                    lambda: model.chat(),
                ):
                    with pytest.raises(ForkedError, match=f"loaded by process {os.getppid()}"):
                        use()
                    said.append(1)
                model.close()
                with load(package, budget="34%") as own:
                    said.append(int(same_bits(own.forward(TOKENS), expected["prefill"])))
            finally:
                os.write(tell, bytes(said))
                os._exit(0)
        os.close(tell)
        assert os.waitpid(child, 0)[1] == 0
        assert os.read(told, 9) == bytes([1, 1, 1, 1])
        os.close(told)
        assert same_bits(model.forward(TOKENS), expected["prefill"])


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_ctrl_c_in_a_read_leaves_nothing_behind(
    package: Path, expected: dict[str, Any], steps: Any
) -> None:
    main = threading.current_thread()
    left = 0

    def interrupted(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        nonlocal left
        if threading.current_thread() is main:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        read(path, offset, buffer)

    for after in (1, 2, 3):
        with load(package, budget="34%") as model:
            watch(model, interrupted)
            left = after
            try:
                model.forward(TOKENS, steps=steps)
                # Only the first read is for certain the caller's.
                assert after > 1
            except KeyboardInterrupt:
                assert left == 0
            check_idle(model)
            left = 0
            assert same_bits(model.forward(TOKENS, steps=steps), expected[steps])


@pytest.fixture
def interrupt() -> Iterator[Callable[[int], None]]:
    """`interrupt(n)`: Ctrl-C at the n-th entry into a function of the pager from now on.

    Entering a function is where CPython looks for signals.
    """
    files = {pager.__file__, slots.__file__, jobs.__file__}

    def start(after: int) -> None:
        left = after

        def tracer(frame: FrameType, event: str, arg: object) -> None:
            nonlocal left
            name = frame.f_code.co_name
            if frame.f_code.co_filename in files and name[0] != "<":
                left -= 1
                if left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt

        sys.settrace(tracer)

    yield start
    sys.settrace(None)


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_ctrl_c_anywhere_in_the_pager_leaves_nothing_behind(
    package: Path, expected: dict[str, Any], interrupt: Callable[[int], None], steps: Any
) -> None:
    inputs = {"tokens": [3, 4]}
    with load(package) as whole:
        right = whole.forward(inputs, steps=steps)
    with load(package, budget="34%", verify="never") as model:
        for after in range(1, 400, 3):
            interrupt(after)
            try:
                model.forward(inputs, steps=steps)
                break
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            check_idle(model)
        else:
            pytest.fail("never came to an end")
        assert after > 40
        assert same_bits(model.forward(inputs, steps=steps), right)


def test_ctrl_c_before_pins_are_let_go(package: Path, expected: dict[str, Any]) -> None:
    with load(package, budget="34%") as model:
        own = model._pager.acquire(0, [0, 1])
        own.__enter__()
        del own  # as when its `with` never came to `__exit__`
        assert model._pager.slots.pinned == 2
        assert same_bits(model.forward(TOKENS), expected["prefill"])
        check_idle(model)
    assert not hasattr(pager.Pins, "__del__")


def test_a_prompt_ends_without_an_exception(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recover(_: object) -> None:
        pytest.fail("an exception was recovered from")

    with load(package, budget="34%") as model:
        monkeypatch.setattr(pager.Pager, "_recover", recover)
        model.forward(TOKENS)


def test_closing_between_a_read_and_its_use(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = pager.Pager._complete

    def complete(self: pager.Pager, *rest: Any) -> bool:
        helped = honest(self, *rest)
        self.close()
        return helped

    monkeypatch.setattr(pager.Pager, "_complete", complete)
    with load(package, budget="34%") as model, pytest.raises(ClosedError):
        model.forward(TOKENS)


def test_closing_waits_for_reads_and_ends_the_threads(package: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    found: list[BaseException] = []

    def slow(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        begun.set()
        poll(go_on.is_set)
        read(path, offset, buffer)

    model = load(package, budget="50%")
    watch(model, slow)

    def work() -> None:
        try:
            model.forward(TOKENS)
        except ClosedError as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    poll(begun.is_set)
    closing = threading.Thread(target=model.close, daemon=True)
    closing.start()
    go_on.set()
    poll(lambda: not thread.is_alive() and not closing.is_alive())
    assert found
    mine = model._pager._readers
    assert mine is not None
    assert not any(one.is_alive() for one in mine._threads)
    with pytest.raises(ClosedError):
        model.forward(TOKENS)


def test_closing_gives_up_what_was_left_to_the_readers(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three are being read, by who needs them and both readers; three wait for a reader."""
    begun: list[str] = []
    found: list[BaseException] = []
    go_on = False

    def held(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        begun.append(path)
        poll(lambda: go_on)
        read(path, offset, buffer)

    def work() -> None:
        try:
            with model._pager.acquire(0, range(EXPERTS)):
                pass
        except ClosedError as error:
            found.append(error)

    monkeypatch.setattr(ShardReader, "_read_once", lambda *_: 0)
    model = load(package, budget="84%", verify="never")
    watch(model, held)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    poll(lambda: len(begun) == 3)
    loading = model._pager.slots.loading
    assert len(loading) == EXPERTS
    closing = threading.Thread(target=model.close, daemon=True)
    closing.start()
    poll(lambda: len(loading) == 3)
    assert closing.is_alive()
    go_on = True
    poll(lambda: not thread.is_alive() and not closing.is_alive())
    assert found
    assert not loading
    assert len(begun) == 3


def test_a_model_that_is_forgotten_ends_its_threads(package: Path) -> None:
    model = load(package, budget="50%")
    model.forward(TOKENS)
    readers = model._pager._readers
    assert readers is not None
    threads = readers._threads
    assert threads
    del model, readers
    poll(lambda: not any(thread.is_alive() for thread in threads))


# Direct reads.


def refuse(error: int) -> Callable[..., Any]:
    def open_extent(path: str, flags: int = 0) -> tuple[int, int, int]:
        raise OSError(error, "made for a test")

    return open_extent


def test_auto_reads_directly_only_what_the_page_cache_cannot_hold(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room, mode in ((None, "buffered"), (1 << 40, "buffered"), (1 << 20, "direct")):
        monkeypatch.setattr("evermind_runtime.shard_reader.available_bytes", lambda room=room: room)
        with load(package, budget="50%") as model:
            assert model.stats().io == mode
            assert bool(model.stats().io_note) == (mode == "buffered")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_direct_reads_is_read_buffered(
    package: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("evermind_runtime.shard_reader.available_bytes", lambda: 0)
    kind = type(load(package)._package.store)
    with load(package, budget="50%") as model:
        # Refused from the second file on: what is read buffered then is said.
        model._package.store.open_extent = refuse(code)  # type: ignore[attr-defined]
        model._pager.reader._files._open = refuse(code)
        assert model.stats().io == "direct"
        assert same_bits(model.forward(TOKENS), expected["prefill"])
        assert model.stats().io == "buffered"
        assert "refused" in model.stats().io_note
    monkeypatch.setattr(kind, "open_extent", staticmethod(refuse(code)))
    with load(package, budget="50%") as model:
        assert model.stats().io == "buffered"
    with pytest.raises(InputError, match="cannot be had"):
        load(package, io="direct")


def test_direct_reads_that_cannot_be_had_are_refused(package: Path, lm_package: Path) -> None:
    with pytest.raises(InputError, match="too small"):
        load(lm_package, io="direct")
    with pytest.raises(InputError, match="expected one of"):
        load(lm_package, io="quick")  # type: ignore[arg-type]


def test_a_shard_cut_short_is_named_by_direct_reads_too(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "lm"))
    path = copy / "experts" / "l001" / "e0002.moe0"
    os.truncate(path, path.stat().st_size - 64)
    with load(copy, io="direct") as model, pytest.raises(TruncatedError, match="e0002"):
        model.forward(TOKENS)


@pytest.mark.parametrize("layout", ["files", "pool"])
@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_every_layout_can_be_read_directly(tmp_path: Path, layout: Any, suffix: str) -> None:
    path = export(random_source("evermind-lm", CONFIG), tmp_path / f"lm{suffix}", layout=layout)
    with load(path) as whole, load(path, budget="50%", io="direct") as model:
        assert same_bits(model.forward(TOKENS), whole.forward(TOKENS))
        assert model.stats().io == "direct"


def test_neighbours_in_a_pool_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = CONFIG | {"dModel": 32, "hiddenDim": 48}
    path = export(random_source("evermind-lm", small), tmp_path / "lm", layout="pool")
    reads: list[int] = []
    honest = ShardReader._read_together

    def counting(self: Any, shards: Any, rooms: Any) -> None:
        reads.append(len(shards))
        honest(self, shards, rooms)

    monkeypatch.setattr(ShardReader, "_read_together", counting)
    with load(path) as model:
        whole = model.forward(TOKENS)
    # A quarter of the slots at once.
    assert max(reads) == LAYERS * EXPERTS // 4
    with load(path, budget="50%", verify="always") as model:
        assert same_bits(model.forward(TOKENS), whole)
        check_idle(model)
