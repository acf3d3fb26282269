"""A loaded package: what `load` returns and applications hold on to."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import ClosedError, ForkedError, InputError
from evermind_manifests.manifest import ExpertsStep, Manifest
from evermind_manifests.package import Package

from . import onnx_runtime
from .arrays import (
    PREFILL_CHUNK,
    check_inputs,
    empty_output,
    join_tokens,
    slice_tokens,
    tokens_in,
)
from .budget import parse_budget, token_cycle_bytes
from .chat import Chat, ChatTemplates, Message
from .choose_compute import ComputeName, choose_compute
from .choose_plan import PlanName
from .choose_policy import PolicyName, make_policy
from .choose_threads import suited_threads
from .decode import BoundDecode
from .devices import open_device
from .generation import Piece, generate
from .guessing import GuessMode
from .introspection import Introspection, report
from .layers import expert_layers
from .memory import available_bytes
from .observer import Observer
from .open_engine import open_engine
from .openers import open_location
from .pager import Pager
from .profile import PROFILE_NAME, Profile, parse_profile, read_profile
from .program import run_program
from .sampling import Sampling
from .shard_reader import IoMode, Verify
from .state import Array, State
from .stats import Stats
from .stores.options import RemoteOptions
from .tokenizer import TextCodec, open_codec
from .trace import TraceWriter

Steps: TypeAlias = Literal["prefill", "decode"]


class PagingWarning(UserWarning):
    """The budget works, but badly; the message says what to expect."""


class ThreadsWarning(UserWarning):
    """The process computes with fewer threads than suit the package."""


class Model:
    """A package ready to run. Thread-safe: one pager, and a `State` for every sequence."""

    def __init__(
        self,
        package: Package,
        *,
        budget: str | int | None,
        device: str,
        threads: int | None,
        verify: Verify,
        policy: PolicyName = "decayed",
        profile: str | os.PathLike[str] | None = None,
        io: IoMode = "auto",
        guess: GuessMode = "auto",
        plan: PlanName = "auto",
        observe: bool = False,
    ) -> None:
        self._package = package
        manifest = package.manifest
        suited = partial(suited_threads, manifest)
        self.threads = onnx_runtime.start(threads, suited)
        if threads is None and self.threads < (wanted := suited(onnx_runtime.usable_cores())):
            warnings.warn(
                f"{manifest.name} would compute on {wanted} threads, but this process's first "
                f"package set up {self.threads}: pass threads={wanted} to the first load",
                ThreadsWarning,
                stacklevel=3,
            )
        self._device = open_device(device)
        heat = _read_profile(package, profile) if profile or policy == "pinned" else None
        layers = expert_layers(manifest)
        self._engine, self.plan = open_engine(
            package,
            self._device,
            plan,
            None if budget is None else parse_budget(budget, manifest),
            free=available_bytes(),
            observed=observe,
            make_pager=lambda room, may_pay: Pager(
                package,
                self._device,
                room,
                make_policy(policy, layers, room, heat),
                verify=verify,
                io=io,
                guess="off" if guess == "auto" and not may_pay else guess,
            ),
        )
        #: The most that expert weights take in memory, in bytes.
        self.budget = self.plan.budget
        self._pager = self._engine.pager
        self._trace: TraceWriter | None = None
        self._listen(None)
        self._closed = False
        self._process = os.getpid()
        self._codec: TextCodec | None = None
        self._templates: ChatTemplates | None = None
        self._observer = Observer(manifest.plan) if observe else None
        self._tokens = 0
        self._lock = threading.Lock()
        #: What to expect of a budget below one token's cycle, else nothing.
        self.thrashing: str | None = None
        if self.plan.name == "paged" and self.budget < token_cycle_bytes(manifest):
            # Here: forecasts bring much that runs do without.
            from .forecast import thrash_warning

            self.thrashing = thrash_warning(self.budget, manifest, policy, heat)
            warnings.warn(self.thrashing, PagingWarning, stacklevel=3)

    @property
    def manifest(self) -> Manifest:
        """The package's manifest."""
        return self._package.manifest

    @property
    def digest(self) -> str:
        """The package's identity: the sha256 of its manifest.json."""
        return self._package.digest

    @property
    def device(self) -> str:
        """Where experts are held and run."""
        return self._device.name

    @property
    def compute(self) -> str:
        """What graphs compute in: `f32`, `f16` or `bf16`."""
        return self._package.compute

    def new_state(self) -> State:
        """A fresh state for one sequence."""
        return State(self.manifest.plan, self._device)

    def forward(
        self,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        state: State | Sequence[State] | None = None,
        steps: Steps = "prefill",
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Named arrays in, named arrays out, as the plan declares them.

        `inputs` may all carry one leading batch axis; every row then has a state of its own.
        `state` (one, or one per row; fresh if not given) is read and moved on. `steps`
        chooses the program: all tokens at once, or one by one. `outputs` limits what is
        computed (an empty list only moves the state). Raises `InputError` for arrays or
        states that do not fit, and `NonFiniteError` where the plan says what must stay finite;
        if it raises, the state of the row it came to is as before.
        """
        self._check_open()
        if steps not in get_args(Steps):
            raise InputError(f"steps: expected one of {get_args(Steps)}, found {steps!r}")
        plan = self.manifest.plan
        arrays, batch = check_inputs(plan, inputs)
        wanted = list(plan.outputs) if outputs is None else list(outputs)
        unknown = [name for name in wanted if name not in plan.outputs]
        if unknown:
            raise InputError(
                f"outputs: expected some of {', '.join(plan.outputs)}, found {unknown}"
            )
        count = 1 if batch is None else batch
        if state is None:
            state = [self.new_state() for _ in range(count)]
        states = [state] if isinstance(state, State) else list(state)
        if len(states) != count or len(set(map(id, states))) != count:
            raise InputError(
                f"state: expected {count} different ones, one per row, found {len(states)}"
            )
        for one in states:
            self._check_state(one)
        if batch is None:
            return self._forward_one(arrays, states[0], steps, wanted)
        rows = [
            self._forward_one(
                {name: array[row] for name, array in arrays.items()}, states[row], steps, wanted
            )
            for row in range(batch)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in wanted}

    def decode(self, inputs: Mapping[str, Array], state: State) -> Mapping[str, Array]:
        """One token through the decode program.

        The result's arrays are overwritten by the state's next step: copy what must last.
        `inputs` are trusted to fit the plan with T = 1; `forward` checks them.
        """
        self._check_open()
        with self._lock:
            self._tokens += 1
        if self._observer is not None:
            # Both programs compute the same; what is observed, prefill alone produces.
            return self._run(inputs, state, list(self.manifest.plan.outputs))
        bound: BoundDecode | None = state.bindings
        # A state may come from another model of the same package.
        if bound is None or not bound.belongs_to(self._engine):
            bound = state.bindings = BoundDecode(self._engine, state)
        bound.step(inputs)
        return bound.outputs

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        state: State | None = None,
    ) -> Iterator[Piece]:
        """Continue `prompt` (text, or token ids), piece by piece as tokens are made.

        Greedy unless `temperature` > 0; `seed` then chooses the stream (default 1), and
        `top_k`, `top_p` and `min_p` which tokens may be drawn. `repetition_penalty` counts the
        prompt and what was made since. A stop token is part of the output and ends it. What is
        not given comes from the package's `generation` defaults. `state` continues an earlier
        sequence; a text that begins one gets the tokens that its tokenizer begins texts with.
        Raises `InputError` if the package has no tokenizer for text, does not
        generate, or a value is out of range or would have no effect.
        """
        self._check_open()
        if state is not None:
            self._check_state(state)
        return generate(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
            stop_tokens=stop_tokens,
            state=state,
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text that the package's chat template makes of `messages`, as transformers does.

        `template` names one of several; by default `tool_use` where there are `tools` and the
        package has it, else `default`. `variables` are what else the template may read, such as
        `enable_thinking`. Raises `InputError` if there is no such template or it refuses the
        messages, `TemplateError` if it fails or takes more than it may, `MissingExtraError`
        without Jinja. Encode the text with `codec.encode(text, special=False)`.
        """
        self._check_open()
        with self._lock:
            if self._templates is None:
                self._templates = ChatTemplates(self._package)
        return self._templates.render(
            messages,
            tools=tools,
            template=template,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def chat(self) -> Chat:
        """A conversation: answers to messages, with what was run kept in between."""
        self._check_open()
        return Chat(self)

    @property
    def codec(self) -> TextCodec | None:
        """The package's tokenizer, opened when first asked for; `None` if it has none."""
        if self._codec is None:
            self._codec = open_codec(self._package)
        return self._codec

    def trace(self, path: str | os.PathLike[str] | None) -> None:
        """Record from now on which experts every token is routed to, into a new file.

        The form is that of `evermind_runtime.trace`. Ends an earlier recording; `None` only
        ends it, as closing the model does. Raises `OSError` if the file cannot be written.
        """
        writer = None
        if path is not None:
            writer = TraceWriter(path, self.digest, expert_layers(self.manifest))
        self._listen(writer)
        if self._trace:
            self._trace.close()
        self._trace = writer

    def _listen(self, writer: TraceWriter | None) -> None:
        """Tell of routed steps: a trace, and a server's store what it will be asked for."""
        self._engine.count_served()
        store, expect = self._package.store, None
        if not store.local:
            from .stores.cached import CachedStore

            expect = store.expect if isinstance(store, CachedStore) else None
        if expect is None or writer is None:
            self._pager.recorder = writer.write if writer else expect
            return
        tell, write = expect, writer.write

        def both(layer: int, tokens: Sequence[Sequence[int]]) -> None:
            tell(layer, tokens)
            write(layer, tokens)

        self._pager.recorder = both

    def observe(self, on: bool = True) -> None:
        """Begin to collect statistics for `introspect` (anew, if it had begun), or end it.

        While observed, every token goes through the prefill program with its experts' graphs of
        statistics, which is slower and agrees with the decode program within rounding. Under the
        plan `resident` they read all they need anew for every token: `load(observe=True)` takes
        another plan.
        """
        self._observer = Observer(self.manifest.plan) if on else None

    def introspect(self) -> Introspection:
        """What experts and routers have done; see `Introspection` and docs/introspection.md.

        Tokens, gates, hits, misses and bytes are counted from loading on, all else from
        `observe` on.
        """
        self._engine.count_served()
        counts, pages = self._engine.counts, self._pager.pages
        return report(self.manifest.layers, counts, pages, self._tokens, self._observer)

    def stats(self) -> Stats:
        """Counters since loading."""
        self._engine.count_served()
        pager = self._pager
        counters, slots = pager.counters, pager.slots.counters
        pooled = self._engine.pools.bytes if self._engine.pools else 0
        return Stats(
            tokens=self._tokens,
            expert_hits=counters.hits,
            expert_misses=counters.misses,
            evictions=slots.evictions,
            bytes_read=counters.bytes_read,
            read_seconds=counters.read_seconds,
            wait_seconds=counters.wait_seconds,
            prefetches=counters.prefetches,
            prefetches_used=counters.prefetches_used,
            prefetch_wasted_bytes=counters.prefetch_wasted_bytes,
            io=pager.reader.mode,
            io_note=pager.reader.note,
            resident_expert_bytes=slots.resident_bytes + pooled,
            peak_resident_expert_bytes=slots.peak_resident_bytes + pooled,
            budget_bytes=self.budget,
            threads=self.threads,
        )

    def close(self) -> None:
        """Give back all memory and files. The model cannot be used afterwards.

        In a process forked from the one that loaded it nothing is given back: it is that one's.
        """
        self.release()
        if self._process == os.getpid():
            self._package.close()

    def release(self) -> None:
        """`close` for a package that goes on being used by who opened it."""
        self._closed = True
        if self._process != os.getpid():
            return
        self.trace(None)
        if self._templates:
            self._templates.close()
        self._pager.close()
        self._engine.sessions.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self._package.location}: this model has been closed")
        if self._process != os.getpid():
            raise ForkedError(
                f"{self._package.location}: this model was loaded by process {self._process}, and "
                f"process {os.getpid()} is a fork of it: its threads and locks are not there",
                hint="Load the package in the process that uses it, or start processes with "
                "`spawn`.",
            )

    def _check_state(self, state: object) -> None:
        if not isinstance(state, State) or not state.fits(self.manifest.plan, self._device.name):
            raise InputError(
                f"state: expected a State of this package ({self.manifest.name}), "
                f"found {'one of another' if isinstance(state, State) else type(state).__name__}"
            )

    def _forward_one(
        self, inputs: Mapping[str, Array], state: State, steps: Steps, wanted: Sequence[str]
    ) -> dict[str, Array]:
        plan = self.manifest.plan
        count = tokens_in(plan, inputs)
        if count == 0:
            # An output that is a state of fixed shape is what the state still is.
            held = state.sides[state.side]
            sources = {name: plan.outputs[name].value or name for name in wanted}
            return {
                name: held[source].copy() if source in held else empty_output(plan.outputs[name])
                for name, source in sources.items()
            }
        state.check_room(count)
        chunk = 1 if steps == "decode" else self._chunk(count)
        # A program leaves the state alone when it fails; a later one must not leave it half-way.
        before = state.mark() if count > chunk else None
        parts: list[dict[str, Array]] = []
        try:
            for begin in range(0, count, chunk):
                part = slice_tokens(plan, inputs, begin, min(begin + chunk, count))
                if steps == "decode":
                    values = self.decode(part, state)
                    parts.append({name: values[name].copy() for name in wanted})
                else:
                    with self._lock:
                        self._tokens += min(chunk, count - begin)
                    parts.append(self._run(part, state, wanted))
        except BaseException:
            if before is not None:
                state.rewind(before)
            raise
        return {
            name: join_tokens(plan.outputs[name], [part[name] for part in parts]) for name in wanted
        }

    def _chunk(self, count: int) -> int:
        """An expert that sees the whole sequence, and no state, gets it in one piece."""
        manifest = self.manifest
        whole = {
            layer.layer for layer in manifest.layers if manifest.kinds[layer.kind].scope != "token"
        }
        cut = all(
            step.inputs or step.layer not in whole
            for step in manifest.plan.prefill
            if isinstance(step, ExpertsStep)
        )
        return PREFILL_CHUNK if cut else count

    def _run(
        self, inputs: Mapping[str, Array], state: State, wanted: Sequence[str]
    ) -> dict[str, Array]:
        plan = self.manifest.plan
        names = {name: plan.outputs[name].value or name for name in wanted}
        engine, observer = self._engine, self._observer
        steps = plan.prefill if observer else engine.prefill
        needed = [*names.values(), *(observer.wanted if observer else ())]
        values = run_program(engine, steps, inputs, state, needed, observer)
        if observer:
            observer.record(values, tokens_in(plan, inputs))
        return {name: values[value] for name, value in names.items()}


def load(
    location: str | os.PathLike[str],
    *,
    budget: str | int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    verify: Verify = "first",
    policy: PolicyName = "decayed",
    profile: str | os.PathLike[str] | None = None,
    remote: RemoteOptions | None = None,
    io: IoMode = "auto",
    guess: GuessMode = "auto",
    plan: PlanName = "auto",
    compute: ComputeName = "auto",
    observe: bool = False,
) -> Model:
    """Open a package (a folder, one `.zip` file, or the URL of either) and make it ready to run.

    A file of another kind is opened by whoever registered for its first four bytes, see
    `openers.py`; with the `[export]` extra that is the peer's files.

    `budget` is the most that experts may take in memory, in bytes, as text (`"64MiB"`) or as
    a share of all expert bytes (`"25%"`); by default all may be resident. It is never
    exceeded. `device` is `"cpu"`, `"cuda"` or `"cuda:N"`. `threads` sizes the process's pool,
    which its first package sets up (default: all usable cores, or one where matrices are too
    small to share out). `verify` says when a shard's sha256 is checked: at its
    first read in this model, always, or never. `policy` chooses which expert to give up when
    the budget is spent: `"decayed"`, `"lru"`, or `"pinned"`, which keeps what `profile` (a
    file; by default the package's own profile.json) says is hot; see docs/paging.md. `plan`
    is how experts are held: `"resident"` (all of them stacked in float32: one call a token),
    `"half"` (all, as they are stored), `"paged"`, or `"auto"`, which takes the fastest that
    fits; `Model.plan` says which and why. `compute` is what graphs compute in: `"f32"`, `"f16"` or
    `"bf16"` where the package has programs for it, or `"auto"`, which is half precision on a GPU
    if it can be and float32 otherwise; `Model.compute` says which. `remote` says how a URL is read
    and which package alone will do; see docs/network.md. `io` says how experts are read:
    `"direct"` from the disk into place, `"buffered"` through the page cache, or what should be the
    faster of them.
    `guess` is whether a package's guesses of what the next layer will need are read ahead:
    `"on"`, `"off"`, or `"auto"`, which is off for large experts of a package on this machine.
    `observe` begins to collect statistics at once, as `Model.observe` does later, and leaves out
    the plan `"resident"`, which has none.

    Raises `BudgetError` if one step's experts or the plan asked for do not fit,
    `DeviceError` for a device or thread count that cannot be had, `UnsupportedError` for programs
    that the package does not have, `InputError` for a policy
    without the profile it needs, direct reads or a plan that cannot be had, `ManifestError` or
    `IntegrityError` for a package that is not what it should be, and `NetworkError` for one
    that cannot be fetched.
    """
    options = remote or RemoteOptions()
    package = open_location(location, options)
    try:
        chosen = choose_compute(compute, package.manifest, device)
        if chosen != "f32":
            package = package.computing(chosen)
        if not package.store.local:
            from .stores.warm_up import warm_up

            warm_up(package, options)
        return Model(
            package,
            budget=budget,
            device=device,
            threads=threads,
            verify=verify,
            policy=policy,
            profile=profile,
            io=io,
            guess=guess,
            plan=plan,
            observe=observe,
        )
    except BaseException:
        package.close()
        raise


def _read_profile(package: Package, path: str | os.PathLike[str] | None) -> Profile | None:
    """The profile in the file at `path`, else the package's own if it has one."""
    layers = expert_layers(package.manifest)
    if path is not None:
        return read_profile(path, layers)
    if PROFILE_NAME not in package.manifest.files:
        return None
    return parse_profile(package.read_file(PROFILE_NAME), layers, PROFILE_NAME)
