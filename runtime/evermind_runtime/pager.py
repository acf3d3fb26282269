"""The pager: experts in and out of memory under a hard byte budget.

`acquire` gives the slots of the experts a step needs, reading the missing ones; they stay
pinned until its `with` ends. `read_ahead` begins with what will be needed soon.
Nothing pinned is ever evicted, and the bytes of all slots together never exceed the budget.
A request that finds all room pinned by others waits, holding nothing, for their release.

One lock guards all that is known of slots; it is never held while bytes are read. A read is a
*job*: a caller that needs experts now does the work itself, helped by the reader threads where
experts are large, and waits for what another has begun to read.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import get_args

from evermind_manifests.errors import ClosedError, GraphError, InputError
from evermind_manifests.package import Package

from .budget import check_budget
from .devices import Device, Slot
from .guessing import GuessMode, GuessRecord
from .jobs import ExpertPages, Job, PagerCounters, make_gate, open_gates
from .layers import slot_bytes
from .policies import ExpertKey, Policy
from .read_plan import AHEAD, plan_batches, reads_in_threads
from .readers import Readers
from .shard_reader import IoMode, ReadAbandonedError, ShardReader, Verify
from .slots import SlotTable

# After so many reads that the page cache had, guesses would only cost time.
_CACHED_READS = 8
# How often one who waits for room looks for pins that Ctrl-C has left.
_RECLAIM_SECONDS = 1.0


class Pins:
    """Experts in use: `with pager.acquire(…) as slots`. Nothing stays pinned after it."""

    __slots__ = ("__weakref__", "_experts", "_layer", "_pager", "_pinned")

    def __init__(self, pager: Pager, layer: int, experts: Sequence[int]) -> None:
        self._pager = pager
        self._layer = layer
        self._experts = experts
        self._pinned: list[Slot] = []

    def __enter__(self) -> list[Slot]:
        try:
            self._pager._entered[id(self._pinned)] = (weakref.ref(self), self._pinned)
            return self._pager._pin_all(self._layer, self._experts, self._pinned)
        except BaseException:
            self._pager._let_go(self._pinned)
            self._pager._recover()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._pager._let_go(self._pinned)
        except BaseException:
            self._pager._let_go(self._pinned)
            self._pager._recover()
            raise


class Pager:
    """Owns every slot of one package. Safe to use from several threads."""

    def __init__(
        self,
        package: Package,
        device: Device,
        budget: int,
        policy: Policy,
        *,
        verify: Verify = "first",
        io: IoMode = "auto",
        guess: GuessMode = "auto",
    ) -> None:
        """No expert is read yet.

        Raises `BudgetError` if not even one step fits, `InputError` for an unknown option or
        direct reads that cannot be had.
        """
        if guess not in get_args(GuessMode):
            raise InputError(f"guess: expected one of {get_args(GuessMode)}, found {guess!r}")
        check_budget(budget, package.manifest)
        self.budget = budget
        self.counters = PagerCounters()
        #: The same by expert, for those that were ever needed.
        self.pages: defaultdict[ExpertKey, ExpertPages] = defaultdict(ExpertPages)
        #: Told of every routed step, as the policy is, while somebody records a trace.
        self.recorder: Callable[[int, Sequence[Sequence[int]]], None] | None = None
        self.reader = ShardReader(package, io=io, verify=verify, budget=budget)
        self._package = package
        self._policy = policy
        self._experts = {layer.layer: layer.experts for layer in package.manifest.layers}
        self._size = slot_bytes(package.manifest)
        self._readers = Readers() if reads_in_threads(self._size) else None
        # How many of the latest reads that steps waited for the page cache had.
        self._cached = 0
        # A plain lock: no signal is handled between taking it and the `with` it belongs to.
        self._lock = threading.Lock()
        count = sum(self._experts.values())
        self._table: SlotTable[Job] = SlotTable(device, self._size, budget, count, policy)
        # Jobs nobody has begun: what steps wait for, and what is read ahead.
        self._urgent: deque[Job] = deque()
        self._later: deque[Job] = deque()
        self._guesses: deque[Job] = deque()
        # Steps that wait for reads: nothing is read ahead meanwhile.
        self._demands = 0
        # What was read ahead, by layer, and is kept until the layer's step needs it.
        self._held: dict[int, set[ExpertKey]] = {}
        # Of that, what was missing as its layer's step began.
        self._missed: defaultdict[int, set[ExpertKey]] = defaultdict(set)
        # What the last guess for a layer has reading, and how guesses have done. With all
        # experts resident there is nothing to guess.
        self._guessed: dict[int, dict[ExpertKey, Job]] = {}
        self._records: dict[int, GuessRecord] = {}
        all_fit = self._table.most >= count
        if guess != "off" and self._readers and not all_fit:
            self._records = {layer: GuessRecord() for layer in self._experts}
        # Held locks of callers that wait for room.
        self._waiting: list[threading.Lock] = []
        # What is pinned, by whom: Ctrl-C may strike on the very way into `Pins.__exit__`. A
        # `__del__` would not do: an exception in it, Ctrl-C among them, is swallowed.
        self._entered: dict[int, tuple[weakref.ref[Pins], list[Slot]]] = {}
        self._closed = False

    @property
    def slots(self) -> SlotTable[Job]:
        """What lies where; to look at, under no lock."""
        return self._table

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """A step of `layer` begins: for each token, oldest first, the experts it will acquire."""
        try:
            with self._lock:
                self._policy.routed(layer, tokens)
                if self.recorder:
                    self.recorder(layer, tokens)
                if self._held:
                    self._held.pop(layer, None)
                if self._missed:
                    self._missed.pop(layer, None)
                if guessed := self._guessed.pop(layer, None):
                    self._resolve(layer, guessed, tokens)
        except BaseException:
            self._recover()
            raise

    def guesses(self, layer: int) -> bool:
        """Whether guesses for `layer` are of use."""
        record = self._records.get(layer)
        return record is not None and record.on and self._cached < _CACHED_READS

    def acquire(self, layer: int, experts: Sequence[int]) -> Pins:
        """The slots of these experts of one layer, pinned while its `with` runs.

        Entering raises `GraphError` unless they are different experts of the layer,
        `ShardDigestError` if a shard is not what the manifest says, `ClosedError` after
        `close`, or whatever the store raises; nothing is pinned then.
        """
        return Pins(self, layer, experts)

    def stream(self, layer: int, experts: Sequence[int]) -> Generator[Slot, None, None]:
        """The slots of these experts in turn, each pinned until the next is asked for.

        Several small ones are read at once, large ones while others run. Close the iterator
        (`contextlib.closing`). Raises as `acquire`.
        """
        if not experts:
            return
        self._check(layer, experts)
        batches = plan_batches(experts, self._size, self._table.most)
        to_come = {(layer, expert) for expert in experts}
        try:
            for at, batch in enumerate(batches):
                with self.acquire(layer, batch) as slots:
                    to_come.difference_update((layer, expert) for expert in batch)
                    soon = batches[at + 1 : at + 1 + AHEAD]
                    self.read_ahead(layer, [e for later in soon for e in later], keep=to_come)
                    yield from slots
        except BaseException:
            self._recover()
            raise
        finally:
            with self._lock:
                self._held.pop(layer, None)
                self._missed.pop(layer, None)

    def expect(self, layer: int, experts: Sequence[int]) -> list[list[int]]:
        """The groups in which to acquire these experts: all that are there, then one by one.

        What is missing is read meanwhile, where reading takes time.
        """
        resident = self._table.resident
        missing = [expert for expert in experts if (layer, expert) not in resident]
        if missing and self._cached < _CACHED_READS:
            self.read_ahead(layer, experts)
        there = [expert for expert in experts if expert not in missing]
        return [*([there] if there else []), *([expert] for expert in missing)]

    def read_ahead(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        keep: Collection[ExpertKey] = (),
        guess: bool = False,
    ) -> None:
        """Begin to read what `layer` will need soon, where there is room for it.

        What was read stays at least until the layer's next `acquire`, if steps leave the
        room; `keep` is not given up for it. Does nothing where experts are small.
        """
        if self._readers is None:
            return
        keys = [(layer, expert) for expert in experts]
        try:
            with self._lock:
                self._held.setdefault(layer, set()).update(keys)
                for key in keys:
                    if key in self._table.resident or key in self._table.loading:
                        continue
                    if self._closed or self._waiting or not self._table.has_room():
                        break
                    slot = self._table.take(lambda one: self._spare(one) and one not in keep)
                    if slot is None:
                        break
                    job = self._begin([key], [slot], wanted=False, guess=guess)
                    if guess:
                        self._guessed.setdefault(layer, {})[key] = job
                    else:
                        self._missed[layer].add(key)
                    (self._guesses if guess else self._later).append(job)
                    self._readers.wake(self._work)
        except BaseException:
            self._recover()
            raise

    def served(self, layer: int, uses: Sequence[int]) -> None:
        """How often each expert was used of a layer where all stand in pools."""
        with self._lock:
            for expert, count in enumerate(uses):
                if count:
                    self.counters.hits += count
                    self.pages[layer, expert].hits += count

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Read ahead what `layer`'s router will probably choose, likeliest first.

        Only while no step waits for a read; what is no expert of the layer is passed over.
        """
        known = [expert for expert in experts if 0 <= expert < self._experts[layer]]
        self.read_ahead(layer, known, guess=True)

    def close(self) -> None:
        """Drop every slot. Reads that run are waited for, what waits is refused."""
        with self._lock:
            self._closed = True
            for job in set(self._table.loading.values()):
                self._give_up(job)
            open_gates(self._waiting)
        if self._readers:
            self._readers.close()
        self.reader.close()
        with self._lock:
            self._table.clear()

    def _check(self, layer: int, experts: Sequence[int]) -> None:
        """A router's answer comes from a graph: trust it no more than any file."""
        count = self._experts[layer]
        if len(set(experts)) != len(experts) or min(experts) < 0 or max(experts) >= count:
            raise GraphError(
                f"{self._package.location}: layer {layer}: expected the router to choose "
                f"different experts from 0 to {count - 1}, found {list(experts)}"
            )

    def _pin_all(self, layer: int, experts: Sequence[int], pinned: list[Slot]) -> list[Slot]:
        """What `Pins` enters with; `pinned` remembers at any moment what is pinned.

        Pins all at once, when there is room for all, and reads what is missing.
        """
        self._check(layer, experts)
        keys = [(layer, expert) for expert in experts]
        table, resident = self._table, self._table.resident
        missing: list[ExpertKey] | None = None
        started, helped = 0.0, False
        while True:
            with self._lock:
                if self._closed:
                    raise ClosedError(f"{self._package.location}: this model has been closed")
                before = table.pinned
                if helped:
                    # What another was to read may have failed, and lie elsewhere since.
                    table.unpin(pinned)
                absent = [key for key in keys if key not in resident]
                if missing is None:
                    missing = absent
                if not absent and not pinned:
                    table.pin([resident[key] for key in keys], pinned)
                if table.pinned < before:
                    open_gates(self._waiting)
                if not absent:
                    if missing:
                        self.counters.wait_seconds += time.perf_counter() - started
                    return self._used(keys, missing, helped)
                gate = None
                if table.fits(keys) or (self._reclaim() and table.fits(keys)):
                    mine, others = self._start(keys, pinned)
                else:
                    self._cancel()
                    gate = make_gate(self._waiting)
            started = started or time.perf_counter()
            if gate:
                gate.acquire(timeout=_RECLAIM_SECONDS)
            else:
                helped |= self._complete(mine, others)

    def _used(
        self, keys: Sequence[ExpertKey], missing: Collection[ExpertKey], helped: bool
    ) -> list[Slot]:
        """A step has its experts: tell the counters, and the policy of those that were there."""
        layer = keys[0][0]
        if helped:
            # Whoever read first: those that were missing were used in the order of `keys`.
            for key in missing:
                self._policy.touched(key)
        read = self._missed.get(layer, ())
        misses = len(missing)
        for key in keys:
            if key in missing:
                self.pages[key].misses += 1
                continue
            self._policy.touched(key)
            if key in read:
                self.pages[key].misses += 1
                misses += 1
            else:
                self.pages[key].hits += 1
        self.counters.misses += misses
        self.counters.hits += len(keys) - misses
        if held := self._held.get(layer):
            held.difference_update(keys)
        return [self._table.resident[key] for key in keys]

    def _start(
        self, keys: Sequence[ExpertKey], pinned: list[Slot]
    ) -> tuple[Job | None, Sequence[Job]]:
        """Pin all; gives the job of reading what is missing, and others' to wait for.

        What is there is pinned first, so that room for the others cannot cost it.
        """
        table = self._table
        resident = [table.resident.get(key) for key in keys]
        table.pin([slot for slot in resident if slot is not None], pinned)
        others: list[Job] = []
        wanted: list[ExpertKey] = []
        slots: list[Slot] = []
        for key, there in zip(keys, resident, strict=True):
            if there is not None:
                continue
            if key in table.loading:
                job = table.loading[key]
                self._demands += not job.wanted
                job.wanted, job.cancelled = True, False
                if job.guess and not job.claimed and self._readers:
                    # No guess is begun while a step waits, and what this one reads may fail.
                    self._urgent.append(job)
                    self._readers.wake(self._work)
                table.pin([job.slots[job.keys.index(key)]], pinned)
                others.append(job)
                continue
            slot = table.take(self._spare) if self._held else None
            slot = slot or table.take(table.evictable)
            assert slot is not None, "the budget was checked to hold one step"
            wanted.append(key)
            slots.append(slot)
        if not wanted:
            return None, others
        mine = self._begin(wanted, slots, wanted=True)
        mine.claimed = True
        table.pin(slots, pinned)
        return mine, others

    def _begin(
        self, keys: list[ExpertKey], slots: list[Slot], *, wanted: bool, guess: bool = False
    ) -> Job:
        job = Job(keys, slots, wanted=wanted, guess=guess)
        self._demands += wanted
        self._table.begin(job, keys, slots)
        return job

    def _complete(self, mine: Job | None, others: Sequence[Job]) -> bool:
        """Read, and wait for what readers and others read; whether there was any of that.

        Raises what went wrong with a job of one's own: others' are worth another try.
        """
        left: Sequence[Job] = ()
        if mine:
            self._perform(mine, others)
            left = mine.left
        jobs = [*others, *left]
        for at, job in enumerate(jobs):
            if not job.claimed and self._claim(job):
                self._perform(job, jobs[at + 1 :])
        for job in jobs:
            if not job.done:
                self._await(job)
        for job in left:
            if isinstance(job.error, Exception) and not isinstance(job.error, ReadAbandonedError):
                raise job.error
        return bool(jobs)

    def _claim(self, job: Job) -> bool:
        """Whether it is this thread that does the job."""
        with self._lock:
            if job.claimed:
                return False
            job.claimed, job.thread = True, threading.get_ident()
            return True

    def _await(self, job: Job) -> None:
        with self._lock:
            if job.done:
                return
            gate = make_gate(job.gates)
        gate.acquire()

    def _work(self) -> None:
        """What a reader thread does when it is woken: the most urgent job, if there is one."""
        with self._lock:
            job = self._next_job()
            if job is None:
                return
            job.claimed, job.thread = True, threading.get_ident()
        # What went wrong is for those who wait for the job.
        with suppress(BaseException):
            self._perform(job)

    def _next_job(self) -> Job | None:
        for queue in (self._urgent, self._later, self._guesses):
            while queue and not (queue is self._guesses and self._demands):
                job = queue.popleft()
                if not job.claimed:
                    self.counters.prefetches += job.guess and not job.wanted
                    return job
        return None

    def _perform(self, job: Job, others: Sequence[Job] = ()) -> None:
        """Read; whatever happens, the job is done afterwards.

        If it has to wait for a disk or a network, the readers begin with the rest and `others`.
        """
        started = time.perf_counter()
        error: BaseException | None = None
        try:
            proceed = (lambda: self._proceeds(job)) if job.guess and not job.wanted else None
            helped = self._readers and proceed is None
            waits = (lambda at: self._call_readers(job, at, others)) if helped else None
            self.reader.fill(job.keys, job.slots, job.read, proceed, waits)
        except BaseException as caught:
            error = caught
            raise
        finally:
            with self._lock:
                self.counters.read_seconds += time.perf_counter() - started
                if error is None and not job.guess:
                    self._cached += len(job.keys)
                self._settle(job, error)

    def _call_readers(self, job: Job, at: int, others: Sequence[Job]) -> None:
        """Leave what follows `at` in `job`, and what nobody has begun, to the readers."""
        assert self._readers
        with self._lock:
            for key, slot in zip(job.keys[at + 1 :], job.slots[at + 1 :], strict=True):
                one = Job([key], [slot], wanted=True)
                self._demands += 1
                self._table.loading[key] = one
                job.left.append(one)
            del job.keys[at + 1 :], job.slots[at + 1 :], job.read[at + 1 :]
            # Those that stay are added once they are read, and are no reads after this one.
            self._cached = -len(job.keys)
            waiting = [one for one in (*job.left, *others) if not one.claimed]
            self._urgent += waiting
        for _ in waiting:
            self._readers.wake(self._work)

    def _proceeds(self, job: Job) -> bool:
        """Whether a guess should be read on: not while a step waits for other reads."""
        return job.wanted or not (job.cancelled or self._demands)

    def _settle(self, job: Job, error: BaseException | None) -> None:
        if job.done:
            return
        for key, read in zip(job.keys, job.read, strict=False):
            self.counters.bytes_read += read
            self.pages[key].bytes_read += read
        # With an error its neighbours go too: `fill` does not tell which of them had been
        # verified, a request that fails has no use for them, and reading them again is rare.
        self._table.end(job, job.keys, job.slots, filled=error is None)
        job.error = error
        # Whoever still finds it in a queue must not touch the slots.
        job.claimed = True
        job.done = True
        self._demands -= job.wanted
        if job.gates:
            open_gates(job.gates)
        if self._waiting:
            open_gates(self._waiting)
        if job.cancelled or isinstance(error, ReadAbandonedError):
            self.counters.prefetch_wasted_bytes += sum(job.read)
        if self._guesses and self._readers and not self._demands:
            for _ in self._guesses:
                self._readers.wake(self._work)

    def _resolve(
        self, layer: int, guessed: dict[ExpertKey, Job], tokens: Sequence[Sequence[int]]
    ) -> None:
        """A layer's step begins: what was guessed right, and what need not be read on."""
        needed = {(layer, expert) for experts in tokens for expert in experts}
        for key, job in guessed.items():
            used = key in needed
            if job.claimed and not isinstance(job.error, ReadAbandonedError):
                self._records[layer].resolved(used=used)
                self.counters.prefetches_used += used
            if used:
                continue
            if job.done:
                # What was given up has been counted.
                if not job.cancelled and not isinstance(job.error, ReadAbandonedError):
                    self.counters.prefetch_wasted_bytes += sum(job.read)
            else:
                job.cancelled = True
                self._give_up(job)

    def _cancel(self) -> None:
        """Give up what is read ahead: a step needs the room."""
        for job in set(self._table.loading.values()):
            if not job.wanted:
                job.cancelled = True
                self._give_up(job)

    def _give_up(self, job: Job) -> None:
        """End a job that nobody has begun."""
        if not job.claimed:
            self._settle(job, ReadAbandonedError())

    def _let_go(self, pinned: list[Slot]) -> None:
        with self._lock:
            if self._table.unpin(pinned):
                open_gates(self._waiting)
            self._entered.pop(id(pinned), None)

    def _reclaim(self) -> bool:
        """Undo the pins of those who were interrupted before they could; whether there were."""
        left = [at for at, (pins, _) in self._entered.items() if pins() is None]
        for at in left:
            self._table.unpin(self._entered.pop(at)[1])
        return bool(left)

    def _recover(self) -> None:
        """After an exception, which may be Ctrl-C at any place: end this thread's jobs.

        Those it had not begun would else wait for ever, as would slots on their way.
        """
        with self._lock:
            for job in set(self._table.loading.values()):
                if job.thread == threading.get_ident():
                    self._settle(job, ReadAbandonedError())
            self._table.recover(lambda job: job.slots)
            self._demands = sum(job.wanted for job in set(self._table.loading.values()))
            open_gates(self._waiting)

    def _spare(self, key: ExpertKey) -> bool:
        """Whether nobody uses `key` now, nor has it been read for one who soon will."""
        return self._table.evictable(key) and key not in self._held.get(key[0], ())
