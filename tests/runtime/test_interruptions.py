"""Forks, Ctrl-C and close while large experts are read."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from evermind_manifests.errors import (
    ClosedError,
    ForkedError,
)
from evermind_runtime import jobs, pager, slots
from evermind_runtime.shard_reader import ShardReader

from tests.runtime.large_experts import EXPERTS, TOKENS, Read, load, watch
from tests.runtime.paging import check_idle, poll, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_its_parents_experts_alone(
    large_package: Path, large_results: dict[str, Any]
) -> None:
    with load(large_package, budget="34%") as model:
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
        assert same_bits(model.forward(TOKENS), large_results["prefill"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_cannot_use_its_parents_model(
    large_package: Path, large_results: dict[str, Any]
) -> None:
    """Its readers are not there; what it loads itself has its own."""
    told, tell = os.pipe()
    with load(large_package, budget="34%") as model:
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
                with load(large_package, budget="34%") as own:
                    said.append(int(same_bits(own.forward(TOKENS), large_results["prefill"])))
            finally:
                os.write(tell, bytes(said))
                os._exit(0)
        os.close(tell)
        assert os.waitpid(child, 0)[1] == 0
        assert os.read(told, 9) == bytes([1, 1, 1, 1])
        os.close(told)
        assert same_bits(model.forward(TOKENS), large_results["prefill"])


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_ctrl_c_in_a_read_leaves_nothing_behind(
    large_package: Path, large_results: dict[str, Any], steps: Any
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
        with load(large_package, budget="34%") as model:
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
            assert same_bits(model.forward(TOKENS, steps=steps), large_results[steps])


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
    large_package: Path, large_results: dict[str, Any], interrupt: Callable[[int], None], steps: Any
) -> None:
    inputs = {"tokens": [3, 4]}
    with load(large_package) as whole:
        right = whole.forward(inputs, steps=steps)
    with load(large_package, budget="34%", verify="never") as model:
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


def test_ctrl_c_before_pins_are_let_go(large_package: Path, large_results: dict[str, Any]) -> None:
    with load(large_package, budget="34%") as model:
        own = model._pager.acquire(0, [0, 1])
        own.__enter__()
        del own  # as when its `with` never came to `__exit__`
        assert model._pager.slots.pinned == 2
        assert same_bits(model.forward(TOKENS), large_results["prefill"])
        check_idle(model)
    assert not hasattr(pager.Pins, "__del__")


def test_a_prompt_ends_without_an_exception(
    large_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recover(_: object) -> None:
        pytest.fail("an exception was recovered from")

    with load(large_package, budget="34%") as model:
        monkeypatch.setattr(pager.Pager, "_recover", recover)
        model.forward(TOKENS)


def test_closing_between_a_read_and_its_use(
    large_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = pager.Pager._complete

    def complete(self: pager.Pager, *rest: Any) -> bool:
        helped = honest(self, *rest)
        self.close()
        return helped

    monkeypatch.setattr(pager.Pager, "_complete", complete)
    with load(large_package, budget="34%") as model, pytest.raises(ClosedError):
        model.forward(TOKENS)


def test_closing_waits_for_reads_and_ends_the_threads(large_package: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    found: list[BaseException] = []

    def slow(read: Read, path: str, offset: int, buffer: memoryview) -> None:
        begun.set()
        poll(go_on.is_set)
        read(path, offset, buffer)

    model = load(large_package, budget="50%")
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
    large_package: Path, monkeypatch: pytest.MonkeyPatch
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
    model = load(large_package, budget="84%", verify="never")
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


def test_a_model_that_is_forgotten_ends_its_threads(large_package: Path) -> None:
    model = load(large_package, budget="50%")
    model.forward(TOKENS)
    readers = model._pager._readers
    assert readers is not None
    threads = readers._threads
    assert threads
    del model, readers
    poll(lambda: not any(thread.is_alive() for thread in threads))
