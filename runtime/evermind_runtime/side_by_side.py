"""A token's experts side by side: some on threads of ONNX Runtime's pool, others on the caller's.

ONNX Runtime casts bfloat16 on one thread, and what that core has written the other must fetch
from its cache to multiply: two threads took two to four times as long as one. So each thread
gets experts of its own. Those of float16 and float32 share every operator's work well, and run
one after the other on all threads (BENCHMARKS.md).

A Python thread for each expert would fight the pool's threads for the cores, as those wait for
work spinning: `run_async` has a thread of the pool itself run a graph. Who runs an expert and
when changes nothing of what it gives, and the caller adds up in an order of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from evermind_manifests.errors import GraphError
from evermind_manifests.manifest import Kind

from . import onnx_runtime
from .devices import CpuSlot
from .jobs import make_gate, open_gates
from .pager import Pager, Pins
from .sessions import graph_failed
from .state import Array

if TYPE_CHECKING:
    import onnxruntime as ort

Feed: TypeAlias = "dict[str, ort.OrtValue]"


class _Group:
    """Experts that were acquired together, and so are let go together: by who runs the last."""

    def __init__(self, pins: Pins, count: int) -> None:
        self._pins = pins
        self._left = count

    def one_done(self) -> bool:
        """Whether that was the last; call it under a lock."""
        self._left -= 1
        return self._left == 0

    def let_go(self) -> None:
        """Unpin all. Does nothing the second time."""
        self._pins.__exit__(None, None, None)


class _Run:
    """One expert to run: what goes in, and the group it belongs to."""

    __slots__ = ("expert", "feed", "group")

    def __init__(self, expert: int, feed: Feed, group: _Group) -> None:
        self.expert = expert
        self.feed = feed
        self.group = group


class _Helper:
    """A thread of the pool that works for a step, one expert after the other."""

    __slots__ = ("__weakref__",)


class SideBySide:
    """The experts of one step. For one call of `run`."""

    def __init__(
        self, pager: Pager, layer: int, kind: Kind, session: Any, given: Mapping[str, ort.OrtValue]
    ) -> None:
        """`session` is of the graph of `kind`; `given` are its inputs that are no weights."""
        self._pager = pager
        self._layer = layer
        self._kind = kind
        self._session = session
        self._given = given
        self._outputs: dict[int, Array] = {}
        # Guards what follows.
        self._lock = threading.Lock()
        self._ready: deque[_Run] = deque()
        self._groups: list[_Group] = []
        self._helpers: set[_Helper] = set()
        self._error: BaseException | None = None
        # Of a caller that waits for its helpers.
        self._gates: list[threading.Lock] = []

    def run(self, groups: Sequence[Sequence[int]]) -> dict[int, Array]:
        """Expert → what it gives, `(tokens, width)`.

        Groups of experts are acquired in turn; while one is waited for, helpers run those before.
        Nothing is held while waiting but what helpers run now, so that steps of several threads
        cannot wait for each other for ever. Raises `GraphError` if the graph fails, or what the
        pager raises; no helper is at work afterwards.
        """
        try:
            for group in groups:
                if self._error is not None:
                    break
                self._acquire(group)
                # Even if nothing is left for the caller: a thread of the pool that is at work
                # cannot be in the way of what it runs itself.
                while self._ready and self._call_helper():
                    pass
                while (one := self._next()) is not None:
                    self._keep(one, self._compute(one.feed))
        finally:
            self._ready.clear()
            try:
                self._await_helpers()
            finally:
                for held in self._groups:
                    held.let_go()
        if self._error is not None:
            raise self._error
        return self._outputs

    def _acquire(self, group: Sequence[int]) -> None:
        pins = self._pager.acquire(self._layer, group)
        slots = pins.__enter__()
        held = _Group(pins, len(group))
        self._groups.append(held)
        names = [spec.name for spec in self._kind.tensors]
        for expert, slot in zip(group, slots, strict=True):
            assert isinstance(slot, CpuSlot), "experts run side by side on a CPU only"
            values = zip(names, slot.values(self._kind), strict=True)
            self._ready.append(_Run(expert, {**self._given, **dict(values)}, held))

    def _next(self) -> _Run | None:
        with suppress(IndexError):
            return self._ready.popleft()
        return None

    def _compute(self, feed: Feed) -> Array:
        try:
            (output,) = self._session.run(["y"], feed)
        except Exception as error:
            raise self._failed(error) from error
        result: Array = output
        return result

    def _keep(self, one: _Run, output: Array) -> None:
        with self._lock:
            self._outputs[one.expert] = output
            last = one.group.one_done()
        if last:
            one.group.let_go()

    def _call_helper(self) -> bool:
        """Have a thread of the pool begin with what is ready, if one is idle."""
        helper = _Helper()
        try:
            with self._lock:
                self._helpers.add(helper)
            if onnx_runtime.take_worker(helper) and (one := self._next()) is not None:
                self._start(helper, one)
                return True
            self._leave(helper)
        except BaseException:
            # If Ctrl-C struck just when it had begun nobody waits for it: what it gives is lost.
            self._leave(helper)
            raise
        return False

    def _start(self, helper: _Helper, one: _Run) -> None:
        """Whoever refers to `helper` and `one` keeps the session and the weights alive."""
        self._session.run_async(["y"], one.feed, self._finished, (helper, one))

    def _finished(self, outputs: Sequence[Array], what: tuple[_Helper, _Run], error: str) -> None:
        """On a thread of the pool, which goes on with what is ready."""
        helper, one = what
        try:
            if error:
                raise self._failed(error)
            self._keep(one, outputs[0])
            if (following := self._next()) is not None:
                self._start(helper, following)
                return
        except BaseException as caught:
            self._error = self._error or caught
            self._ready.clear()
        self._leave(helper)

    def _leave(self, helper: _Helper) -> None:
        onnx_runtime.return_worker(helper)
        with self._lock:
            self._helpers.discard(helper)
            if not self._helpers:
                open_gates(self._gates)

    def _await_helpers(self) -> None:
        """Ctrl-C meanwhile is raised at the end: what helpers read must not change before.

        Who insists gets out at once; what helpers still give is lost then.
        """
        interrupted: BaseException | None = None
        while True:
            try:
                with self._lock:
                    if not self._helpers:
                        break
                    gate = make_gate(self._gates)
                gate.acquire()
            except BaseException as error:
                if interrupted is not None:
                    raise
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _failed(self, error: Exception | str) -> GraphError:
        return graph_failed(self._kind.graph, self._session, error)
