"""Experts side by side on the pool's threads: the same bits, and nothing left pinned."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import GraphError, ShardDigestError
from evermind_runtime import jobs, onnx_runtime, open_engine, pager, side_by_side
from evermind_runtime.side_by_side import SideBySide

from tests.packages import export, random_source
from tests.runtime.paging import check_idle, same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a pool of two threads"),
]

# Experts of 384 KiB in bfloat16: large enough to be read by threads.
CONFIG = {
    "vocabSize": 40,
    "dModel": 256,
    "numLayers": 2,
    "hiddenDim": 384,
    "numExperts": 8,
    "topK": 4,
}
TOKENS = {"tokens": list(range(12))}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side") / "lm"
    return export(random_source("evermind-lm", CONFIG), folder, dtype="bf16")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_engine, "SIDE_BY_SIDE_BYTES", 1)


@pytest.fixture
def alone(package: Path) -> dict[str, Any]:
    """What decoding gives where the caller runs every expert."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_runtime, "take_worker", lambda _: False)
        with em.load(package, plan="half") as model:
            return model.forward(TOKENS, steps="decode")


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The experts that threads of the pool ran."""
    experts: list[int] = []
    honest = SideBySide._finished

    def finished(self: SideBySide, outputs: Any, what: Any, error: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        experts.append(what[1].expert)
        honest(self, outputs, what, error)

    monkeypatch.setattr(SideBySide, "_finished", finished)
    return experts


@pytest.mark.parametrize("budget", [None, "25%", "40%"])
@pytest.mark.parametrize("cold", [True, False])
def test_helpers_change_no_bit(
    package: Path, alone: dict[str, Any], helped: list[int], budget: str | None, cold: bool
) -> None:
    with em.load(package, budget=budget, plan="paged" if budget else "half") as model:
        if cold:
            model._pager.reader._nowait = False
        for _ in range(3):
            assert same_bits(model.forward(TOKENS, steps="decode"), alone)
            check_idle(model)
        assert helped
        assert model.stats().peak_resident_expert_bytes <= model.budget


def test_whoever_is_faster_changes_no_bit(
    package: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, rng = SideBySide._keep, random.Random(5)

    def keep(self: SideBySide, one: Any, output: Any) -> None:
        time.sleep(rng.choice([0, 0, 0.002]))
        honest(self, one, output)

    monkeypatch.setattr(SideBySide, "_keep", keep)
    with em.load(package, budget="40%") as model:
        for _ in range(3):
            assert same_bits(model.forward(TOKENS, steps="decode"), alone)


def test_requests_of_several_threads_share_the_least_budget(
    package: Path, alone: dict[str, Any]
) -> None:
    with em.load(package, budget="25%") as model:
        assert model._pager.slots.most == CONFIG["topK"]
        found: list[bool] = []

        def work() -> None:
            for _ in range(3):
                found.append(same_bits(model.forward(TOKENS, steps="decode"), alone))

        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert found == [True] * 12
        check_idle(model)


def test_an_error_on_a_thread_of_the_pool_is_the_callers(
    package: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SideBySide._start

    def start(self: SideBySide, helper: Any, one: Any) -> None:
        one.feed["x"] = next(iter(self._given.values())).__class__.ortvalue_from_numpy(
            np.zeros((1, 3), dtype=np.float32)
        )
        honest(self, helper, one)

    with em.load(package, budget="40%") as model:
        state = model.new_state()
        with monkeypatch.context() as patch:
            patch.setattr(SideBySide, "_start", start)
            with pytest.raises(
                GraphError, match=r"graphs/expert\S+: the graph failed on device 'cpu': .*x"
            ):
                model.forward(TOKENS, steps="decode", state=state)
        check_idle(model)
        assert same_bits(model.forward(TOKENS, steps="decode", state=state), alone)


def test_an_error_of_the_caller_waits_for_helpers(
    package: Path, alone: dict[str, Any], helped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, failed = SideBySide._finished, threading.Event()

    def finished(self: SideBySide, outputs: Any, what: Any, error: str) -> None:
        assert failed.wait(timeout=60)
        honest(self, outputs, what, error)

    def compute(self: SideBySide, feed: Any) -> None:
        failed.set()
        raise MemoryError

    with em.load(package, budget="40%") as model:
        with monkeypatch.context() as patch:
            patch.setattr(SideBySide, "_finished", finished)
            patch.setattr(SideBySide, "_compute", compute)
            with pytest.raises(MemoryError):
                model.forward(TOKENS, steps="decode")
            assert len(helped) == 1
        check_idle(model)
        assert same_bits(model.forward(TOKENS, steps="decode"), alone)


def test_a_damaged_expert_is_told_while_others_run(package: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(package, tmp_path / "damaged")
    with em.load(package, plan="half") as model:
        state = model.new_state()
        model.forward({"tokens": [1]}, state=state, steps="decode")
        layer, expert = list(model._pager.slots.resident)[-1]
        (shard,) = [s for s in model.manifest.shards if (s.layer, s.expert) == (layer, expert)]
    with open(damaged / shard.file, "r+b") as file:
        file.seek(shard.offset + shard.bytes // 2)
        file.write(bytes(64))
    with em.load(damaged, budget="40%") as model:
        with pytest.raises(ShardDigestError):
            model.forward({"tokens": [1]}, steps="decode")
        check_idle(model)


@pytest.fixture
def interrupt() -> Iterator[Callable[[int], None]]:
    """`interrupt(n)`: Ctrl-C at the n-th entry into a function of these files by this thread.

    Entering a function is where CPython looks for signals.
    """
    files = {one.__file__ for one in (side_by_side, onnx_runtime, pager, jobs)}

    def start(after: int) -> None:
        left = after

        def tracer(frame: FrameType, event: str, arg: object) -> None:
            nonlocal left
            if frame.f_code.co_filename in files and frame.f_code.co_name[0] != "<":
                left -= 1
                if left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt

        sys.settrace(tracer)

    yield start
    sys.settrace(None)


@pytest.mark.parametrize("budget", ["25%", "100%"])
def test_ctrl_c_anywhere_leaves_nothing_behind(
    package: Path, interrupt: Callable[[int], None], budget: str
) -> None:
    token = {"tokens": [7]}
    with em.load(package, plan="half") as whole:
        right = whole.forward(token, steps="decode")
    with em.load(package, budget=budget, plan="paged", verify="never") as model:
        for after in range(1, 1000, 2):
            interrupt(after)
            try:
                model.forward(token, steps="decode")
                break
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            check_idle(model)
        else:
            pytest.fail("never came to an end")
        assert after > 40
        assert same_bits(model.forward(token, steps="decode"), right)


def test_only_large_experts_in_bfloat16_run_so(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with em.load(package, plan="half") as model:
        assert model._engine.side_by_side == {0, 1}
        assert model._engine.decode is model.manifest.plan.prefill
    monkeypatch.setattr(open_engine, "SIDE_BY_SIDE_BYTES", 1 << 40)
    with em.load(package, plan="half") as model:
        assert not model._engine.side_by_side
    monkeypatch.setattr(open_engine, "ONE_BY_ONE_BYTES", 1)
    half = export(random_source("evermind-lm", CONFIG), tmp_path / "f16", dtype="f16")
    with em.load(half, plan="half") as model:
        assert not model._engine.side_by_side
        assert model._engine.decode is model.manifest.plan.prefill


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_no_threads_to_help(package: Path, alone: dict[str, Any]) -> None:
    with em.load(package, plan="half") as model:
        model.forward(TOKENS, steps="decode")
        child = os.fork()
        if not child:
            signal.alarm(60)  # kills a child that waits for threads it has not got
            own = em.load(package, plan="half")
            os._exit(0 if same_bits(own.forward(TOKENS, steps="decode"), alone) else 1)
        assert os.waitpid(child, 0)[1] == 0
