"""Run a program of the plan for any number of tokens: values pass over a blackboard.

This executor knows graph steps and experts steps and nothing of models. `decode.py` does
the same for one token with everything bound in advance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import GraphError
from evermind_manifests.manifest import ExpertsStep, GraphStep, Kind, Manifest, Step
from evermind_manifests.structure import routes

from .arrays import tokens_in
from .counts import ExpertCounts
from .devices import Slot
from .finite import FiniteCheck
from .observer import Observer
from .pager import Pager
from .pools import Pools
from .resident import Resident
from .served import Served, ServedTokens
from .sessions import Sessions, graph_failed
from .state import Array, State

if TYPE_CHECKING:
    import onnxruntime as ort


#: (layer, ids (T, k), gates (T, k)) of each layer.
Choices: TypeAlias = list[tuple[int, Array, Array]]


class Engine:
    """What every executor of one model shares."""

    def __init__(
        self,
        manifest: Manifest,
        sessions: Sessions,
        resident: Resident,
        pager: Pager,
        pools: Pools | None = None,
        *,
        one_by_one: bool = False,
    ) -> None:
        """With `pools`, the pooled programs run and the pager only counts.

        Experts that decode `one_by_one` are steps of their own, as in prefill: those at hand
        run while others are read. A fused step waits for all. Those in bfloat16 then run side by
        side.
        """
        self.manifest = manifest
        self.sessions = sessions
        self.resident = resident
        self.pager = pager
        self.kinds: dict[int, Kind] = {
            layer.layer: manifest.kinds[layer.kind] for layer in manifest.layers
        }
        self.finite = FiniteCheck(manifest.plan)
        self.counts = ExpertCounts(manifest.layers)
        self.pools = pools
        plan = manifest.plan
        pooled = plan.pooled if pools else None
        #: The program for any number of tokens, and the one for one token.
        self.prefill: Sequence[Step] = pooled.prefill if pooled else plan.prefill
        self.decode: Sequence[Step] = pooled.decode if pooled else plan.decode
        #: Layers whose experts run side by side.
        self.side_by_side: Collection[int] = ()
        if pooled is None and one_by_one:
            self.decode = plan.prefill
            self.side_by_side = {layer for layer, kind in self.kinds.items() if has_bf16(kind)}
        self._routes = routes(plan)
        widths = {layer.layer: layer.top_k for layer in manifest.layers}
        #: Tokens that pooled steps decoded and nobody has counted.
        self.served_tokens = ServedTokens(
            {layer: widths[layer] for step in self.decode for layer in self.pooled_routes(step)}
        )
        self._weights: dict[str, ort.OrtValue] = {}

    def weight(self, name: str) -> ort.OrtValue:
        """A resident tensor that a step binds as a graph input."""
        if name not in self._weights:
            self._weights[name] = self.resident.value(name)
        return self._weights[name]

    def fixed_inputs(self, step: GraphStep) -> Iterator[tuple[str, ort.OrtValue]]:
        """What a step binds that never changes: resident tensors and pools."""
        for name, tensor in step.weights.items():
            yield name, self.weight(tensor)
        for name, pool in step.pools.items():
            assert self.pools, "pooled programs run once the pools are filled"
            yield name, self.pools.value(pool)

    def pooled_routes(self, step: Step) -> dict[int, tuple[str, str]]:
        """The values (ids, gates) of each layer that a pooled step routes; else none."""
        if isinstance(step, ExpertsStep) or not step.pools:
            return {}
        given = step.outputs.values()
        return {layer: names for layer, names in self._routes.items() if names[0] in given}

    def served(self, choices: Choices) -> None:
        """A pooled step has run: count what its routers chose."""
        for layer, ids, gates in choices:
            # Where a gate is 0 the expert is not needed.
            ids = np.where(gates == 0, -1, ids)
            self.pager.served(layer, self.counts.routed(layer, ids, gates))
            if record := self.pager.recorder:
                record(layer, [[one for one in token if one >= 0] for token in ids.tolist()])

    def served_one(self, ids: npt.NDArray[np.int64], gates: npt.NDArray[np.float32]) -> None:
        """A token went through the pooled decode program: count its routes, a row of
        `served_tokens`, when there are many, or before somebody looks."""
        kept = self.served_tokens.add(ids, gates, keep=self.pager.recorder is None)
        if kept is not None:
            self._count(kept)

    def count_served(self) -> None:
        """Count what has been served so far."""
        self._count(self.served_tokens.take())

    def _count(self, served: Served) -> None:
        ids, gates = served
        if len(ids):
            spans = self.served_tokens.spans
            self.served([(at, ids[:, span], gates[:, span]) for at, span in spans.items()])

    def expert_inputs(self, layer: int, top_k: int) -> list[tuple[str, ...]]:
        """The graph inputs a fused step's experts are bound to, by position."""
        tensors = self.kinds[layer].tensors
        return [tuple(f"expert{i}.{spec.name}" for spec in tensors) for i in range(top_k)]


def has_bf16(kind: Kind) -> bool:
    """Whether some of an expert is stored in bfloat16."""
    return any(spec.dtype == "bf16" for spec in kind.tensors)


def run_program(
    engine: Engine,
    steps: Sequence[Step],
    inputs: Mapping[str, Array],
    state: State,
    wanted: Collection[str],
    observer: Observer | None = None,
) -> dict[str, Array]:
    """Run `steps` on `inputs`; returns the `wanted` values and moves `state` on.

    Steps that neither `wanted` nor the state depends on are left out. If a step fails, or a
    value is not finite that must be, the state is as before. An `observer` sees every expert
    run, in graphs with statistics where the kind has them.
    """
    count = tokens_in(engine.manifest.plan, inputs)
    state.check_room(count)
    # Before anything refers to the arrays: those that are outgrown are freed at once.
    state.reserve(count)
    current = state.readable
    kept = current.keys() | state.buffers.keys()
    board: dict[str, Array] = {**inputs, **current, **state.lengths}
    # What replaces the state does so for the next call: later steps read the old value.
    replaced: dict[str, Array] = {}
    for step, later in needed_steps(steps, wanted, kept):
        if isinstance(step, GraphStep):
            read = later.union(*engine.pooled_routes(step).values())
            values = _run_graph(engine, step, board, state, read)
            if step.pools:
                engine.served(_needed_choices(engine, step, values, wanted))
        else:
            values = {step.y: _run_experts(engine, step, board, observer)}
        for name, array in values.items():
            (replaced if name in current else board)[name] = array
        # What no later step reads is freed: it has a row for each of many tokens.
        board = {name: array for name, array in board.items() if name in later}
        values.clear()
    result = {name: replaced[name] if name in replaced else board[name] for name in wanted}
    engine.finite.check({**inputs, **result, **replaced})
    state.advance(replaced, count)
    return result


def needed_steps(
    steps: Sequence[Step], wanted: Collection[str], state: Collection[str]
) -> list[tuple[Step, frozenset[str]]]:
    """The steps that `wanted` values or the state depend on, in order, and what is needed after
    each: these, and what the steps after it read. Pure.
    """
    needed = frozenset({*wanted, *state})
    kept: list[tuple[Step, frozenset[str]]] = []
    for step in reversed(steps):
        if isinstance(step, ExpertsStep):
            if step.y in needed:
                kept.append((step, needed))
                needed |= {step.x, step.ids, step.gates, *step.inputs.values()}
        elif needed.intersection(step.outputs.values()):
            kept.append((step, needed))
            needed |= {*step.inputs.values()}
            if step.experts:
                needed |= {step.experts.ids, *([step.experts.gates] if step.experts.gates else [])}
    return kept[::-1]


def _needed_choices(
    engine: Engine,
    step: GraphStep,
    values: Mapping[str, Array],
    wanted: Collection[str],
) -> Choices:
    """A pooled step's routes, without those of experts that nobody needed this time."""
    prefill = engine.manifest.plan.prefill
    layers = {
        one.layer
        for one, _ in needed_steps(prefill, wanted, engine.manifest.plan.state)
        if isinstance(one, ExpertsStep)
    }
    return [
        (layer, values[ids], values[gates])
        for layer, (ids, gates) in engine.pooled_routes(step).items()
        if layer in layers
    ]


def run_graph(path: str, session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    """Run what is bound; `GraphError`, naming graph and device, if ONNX Runtime cannot."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise graph_failed(path, session, error) from error


def _run_graph(
    engine: Engine,
    step: GraphStep,
    board: Mapping[str, Array],
    state: State,
    read: Collection[str],
) -> dict[str, Array]:
    """What the step gives of `read`; but buffers of the state are written in place."""
    session = engine.sessions.get(step.graph)
    binding = session.io_binding()
    for name, value in step.inputs.items():
        if value not in state.buffers:
            binding.bind_cpu_input(name, np.ascontiguousarray(board[value]))
    for name, fixed in engine.fixed_inputs(step):
        binding.bind_ortvalue_input(name, fixed)
    outputs = step.outputs.items()
    given = {name: value for name, value in outputs if value in read and value not in state.buffers}
    for name in given:  # first: outputs come in the order in which they are bound
        binding.bind_output(name, "cpu")
    taken = {value: name for name, value in outputs if value in state.buffers}
    for name, value in step.inputs.items():
        if value in taken:
            state.buffers[value].place.bind(binding, name, taken[value])
    if step.experts is None:
        run_graph(step.graph, session, binding)
    else:
        layer = step.experts.layer
        ids: list[int] = board[step.experts.ids].tolist()[0]
        gates = board[step.experts.gates].tolist()[0] if step.experts.gates else None
        at = list(range(len(ids)))
        if gates and 0.0 in gates:
            ids, gates, at = without_zeros(ids, gates)
        engine.pager.routed(layer, [ids])
        engine.counts.routed_one(layer, ids, gates)
        with engine.pager.acquire(layer, ids) as held:
            slots = [held[place] for place in at]
            names = engine.expert_inputs(layer, len(slots))
            for slot, inputs in zip(slots, names, strict=True):
                slot.bind(binding, inputs, engine.kinds[layer])
            run_graph(step.graph, session, binding)
    found = zip(given.values(), binding.get_outputs(), strict=False)
    return {value: one.numpy() for value, one in found}


def without_zeros(
    ids: Sequence[int], gates: Sequence[float]
) -> tuple[list[int], list[float], list[int]]:
    """(ids, gates, places): the experts of one token whose gate is not 0, and for every position
    of a fused step the place among them that is bound there.

    A gate of 0 takes any expert that is held, as its output does not count. Where all gates are
    0 the first one is held for all.
    """
    kept = [place for place, gate in enumerate(gates) if gate != 0] or [0]
    places = [kept.index(place) if place in kept else 0 for place in range(len(ids))]
    return [ids[place] for place in kept], [gates[place] for place in kept], places


def _run_experts(
    engine: Engine, step: ExpertsStep, board: Mapping[str, Array], observer: Observer | None
) -> Array:
    """Expert by expert, in ascending order: each is read once and run once, on its tokens.

    The order never depends on what happens to be resident, so a paged run adds up the same
    numbers in the same order as an unpaged one. Where a gate is 0 the expert is not needed.
    """
    x, ids, gates = board[step.x], board[step.ids], board[step.gates]
    kind = engine.kinds[step.layer]
    ids = np.where(gates == 0, -1, checked_ids(step, ids))
    tokens: list[list[int]] = ids.tolist()
    if int(ids.min()) < 0:
        tokens = [[expert for expert in token if expert >= 0] for token in tokens]
    engine.pager.routed(step.layer, tokens)
    engine.counts.routed(step.layer, ids, gates)
    top_k = ids.shape[1]
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[np.searchsorted(flat[order], 0) :]  # without those that are no expert
    experts, starts = np.unique(flat[order], return_index=True)
    chunk = experts.tolist()
    y: npt.NDArray[np.float32] | None = None
    # Where nothing is needed there is one empty group, and no expert for it.
    groups = np.split(order, starts[1:])
    with closing(engine.pager.stream(step.layer, chunk)) as slots:
        # The slots first: they are asked for once more, and so come to their end.
        for slot, expert, chosen in zip(slots, chunk, groups, strict=False):
            rows = chosen // top_k
            whole = kind.scope == "sequence"
            given = {"x": x if whole else x[rows]}
            given |= {name: board[value] for name, value in step.inputs.items()}
            output = _run_expert(engine, step.layer, expert, slot, given, observer)
            if y is None:
                y = np.zeros((len(x), output.shape[1]), dtype=np.float32)
            # An expert that sees every token answers for all; only its own take the answer.
            y[rows] += gates.ravel()[chosen][:, None] * (output[rows] if whole else output)
    if y is None:  # no token needs any
        declared = engine.sessions.get(kind.graph).get_outputs()[0].shape[-1]
        width = declared if isinstance(declared, int) else x.shape[1]
        y = np.zeros((len(x), width), dtype=np.float32)
    return y


def checked_ids(step: ExpertsStep, ids: Array) -> Array:
    """`ids`. Raises `GraphError` if an expert stands twice for a token, or is none."""
    ranked = np.sort(ids, axis=1)
    if ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] != -1)).any():
        raise GraphError(f"{step.ids}: expected different experts for a token, found one twice")
    least = int(ids.min())
    if least < 0 and not (step.skips and least == -1):
        expected = "experts, or -1 for none" if step.skips else "experts"
        raise GraphError(f"{step.ids}: expected {expected}, found {least}")
    return ids


def _run_expert(
    engine: Engine,
    layer: int,
    expert: int,
    slot: Slot,
    given: Mapping[str, Array],
    observer: Observer | None,
) -> Array:
    kind = engine.kinds[layer]
    graph, statistics = kind.graph, False
    if observer is not None and kind.graph_statistics is not None:
        graph, statistics = kind.graph_statistics, True
    session = engine.sessions.get(graph)
    binding = session.io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    names = [output.name for output in session.get_outputs()] if statistics else ["y"]
    for name in names:
        binding.bind_output(name, "cpu")
    slot.bind(binding, (spec.name for spec in kind.tensors), kind)
    run_graph(graph, session, binding)
    found = dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))
    output: Array = found.pop("y")
    if observer is not None:
        observer.ran(layer, expert, output, found)
    return output
