"""One token at a time: every array bound once, only the k experts rebound at each step.

The bindings belong to a `State` (one IOBinding may not run twice at once) and come in two
sets, since a step reads one side of the state's arrays and writes the other. A state that
grows is bound anew at each step; the row a step adds to it has an array of its own. The state's
buffers are bound as input and output both, and anew when they have moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from evermind_manifests.errors import GraphError
from evermind_manifests.manifest import ExpertsStep, Guess, Step

from .devices import Place, Slot, host_value, numpy_dtype
from .program import Engine, checked_ids, run_graph, without_zeros
from .side_by_side import SideBySide
from .state import Array, State

if TYPE_CHECKING:
    import onnxruntime as ort

_ONNX_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(float16)": np.float16,
}


@dataclass(slots=True)
class _BoundGuess:
    layer: int
    graph: str
    session: Any
    binding: ort.IOBinding
    ids: Array
    copied: list[tuple[str, ort.OrtValue]]


@dataclass(slots=True)
class _BoundStep:
    graph: str
    session: Any
    binding: ort.IOBinding
    # For fused experts: their layer, the router's choice and gates (bound buffers), the
    # inputs' names by position, and what they are bound to now.
    layer: int
    ids: Array | None
    gates: Array | None
    names: list[tuple[str, ...]]
    bound: list[Slot | None]
    # Graph input and state, for each that grows.
    growing: list[tuple[str, str]]
    # Graph input, graph output and state, for each buffer.
    buffers: list[tuple[str, str, str]]
    # Inputs in host memory that the device copies when they are bound.
    copied: list[tuple[str, ort.OrtValue]]
    # For fused experts: what later layers will probably need, to be read while these run.
    guesses: list[_BoundGuess] = field(default_factory=list)
    # What each of `buffers` is bound to now.
    filled: list[Place | None] = field(init=False)

    def __post_init__(self) -> None:
        self.filled = [None] * len(self.buffers)


@dataclass(slots=True)
class _BoundExperts:
    """An experts step: the kind's graph with one token bound, and what it is bound to now.

    `ids`, `gates` and `y` are bound buffers, `output` is what one expert gives; `outputs` has
    room for what all of a token's give. `given` is what the graph takes beside the weights, but
    for what grows.
    """

    step: ExpertsStep
    graph: str
    session: Any
    binding: ort.IOBinding
    ids: Array
    gates: Array
    y: Array
    output: Array
    outputs: Array
    names: tuple[str, ...]
    given: Mapping[str, Array]
    growing: list[tuple[str, str]]
    copied: list[tuple[str, ort.OrtValue]]
    bound: Slot | None = None
    guesses: list[_BoundGuess] = field(default_factory=list)


class BoundDecode:
    """A decode program bound to one state's buffers."""

    def __init__(self, engine: Engine, state: State) -> None:
        plan = engine.manifest.plan
        self._engine = engine
        self._state = state
        self._values: dict[str, Array] = {
            name: np.zeros(
                [1 if isinstance(dim, str) else dim for dim in spec.shape],
                dtype=numpy_dtype(spec.dtype),
            )
            for name, spec in plan.inputs.items()
        }
        self._rows: dict[str, Array] = {
            name: np.zeros((1, *spec.fixed), dtype=numpy_dtype(spec.dtype))
            for name, spec in plan.state.items()
            if name in state.grown
        }
        # What routers of pooled steps chose (bound buffers).
        width = engine.served_tokens.width
        self._routes: tuple[Array, Array] = (
            np.zeros(width, dtype=np.int64),
            np.zeros(width, dtype=np.float32),
        )
        steps = engine.decode
        for step in steps:
            self._allocate(step)
        self._sides = tuple([self._bind(step, side) for step in steps] for side in (0, 1))
        for guess in plan.guesses:
            if engine.pager.guesses(guess.layer):
                self._place(guess, steps)
        # What a step on this side has just written.
        self._checked = tuple(
            {**self._values, **self._rows, **state.sides[1 - side]} for side in (0, 1)
        )
        # An output taken from a state is what the step just wrote: current after the flip.
        self._outputs = tuple(
            {
                name: ({**self._values, **self._rows, **written})[spec.value or name]
                for name, spec in plan.outputs.items()
            }
            for written in state.sides
        )

    def belongs_to(self, engine: Engine) -> bool:
        """Whether these are `engine`'s graphs and experts."""
        return self._engine is engine

    @property
    def outputs(self) -> Mapping[str, Array]:
        """What the last step gave; overwritten by the next."""
        return self._outputs[self._state.side]

    def step(self, inputs: Mapping[str, Array]) -> None:
        """Run the program on one token (arrays as in the plan, T = 1), for `outputs`.

        If it fails, or a value is not finite that must be, the state is as before.
        """
        for name, array in inputs.items():
            self._values[name][...] = array
        pager, state = self._engine.pager, self._state
        if self._rows or state.buffers:
            state.check_room(1)
            state.reserve(1)
            self._bind_buffers()
        for step in self._sides[state.side]:
            for name, value in step.growing:
                step.binding.bind_ortvalue_input(name, _value(state.grown[value].view()))
            for name, copied in step.copied:
                step.binding.bind_ortvalue_input(name, copied)
            if isinstance(step, _BoundExperts):
                self._run_experts(step)
                continue
            if step.ids is None:
                run_graph(step.graph, step.session, step.binding)
                continue
            ids: list[int] = step.ids.tolist()[0]
            gates = None if step.gates is None else step.gates.tolist()[0]
            at = None
            if gates and 0.0 in gates:
                ids, gates, at = without_zeros(ids, gates)
            pager.routed(step.layer, [ids])
            self._engine.counts.routed_one(step.layer, ids, gates)
            with pager.acquire(step.layer, ids) as slots:
                if at:
                    slots = [slots[place] for place in at]
                self._guess(step)
                self._rebind(step, slots)
                run_graph(step.graph, step.session, step.binding)
        if len(self._routes[0]):
            self._engine.served_one(*self._routes)
        self._engine.finite.check(self._checked[state.side])
        state.take_over(self._rows, 1)

    def _bind_buffers(self) -> None:
        """Bind the state's buffers where they are now."""
        for step in self._sides[self._state.side]:
            if isinstance(step, _BoundStep):
                for at, (given, taken, name) in enumerate(step.buffers):
                    place = self._state.buffers[name].place
                    if step.filled[at] is not place:
                        step.filled[at] = None
                        place.bind(step.binding, given, taken)
                        step.filled[at] = place

    def _run_experts(self, step: _BoundExperts) -> None:
        """As `run_program` does it, without those whose gate is 0.

        What is at hand runs while others are read; all is added up in ascending order.
        """
        engine, layer = self._engine, step.step.layer
        pager = engine.pager
        ids: list[int] = step.ids.tolist()[0]
        if len(ids) > 1 or ids[0] < 0:
            checked_ids(step.step, step.ids)
        gates: list[float] = step.gates.tolist()[0]
        chosen = {e: gate for e, gate in zip(ids, gates, strict=True) if gate != 0 and e >= 0}
        pager.routed(layer, [list(chosen)])
        step.y[...] = 0
        if not chosen:
            return
        engine.counts.routed_one(layer, list(chosen), list(chosen.values()))
        in_order = sorted(chosen)
        groups = pager.expect(layer, in_order)
        self._guess(step)
        if layer in engine.side_by_side:
            given = {**step.given, **{n: self._state.grown[v].view() for n, v in step.growing}}
            values = {name: _value(array) for name, array in given.items()}
            beside = SideBySide(pager, layer, engine.kinds[layer], step.session, values)
            for expert, output in beside.run(groups).items():
                step.outputs[in_order.index(expert)] = output[0]
        else:
            self._run_in_turn(step, groups, in_order)
        for place, expert in enumerate(in_order):
            step.y += np.float32(chosen[expert]) * step.outputs[place]

    def _run_in_turn(
        self, step: _BoundExperts, groups: Sequence[Sequence[int]], in_order: list[int]
    ) -> None:
        layer = step.step.layer
        for group in groups:
            with self._engine.pager.acquire(layer, group) as slots:
                for expert, slot in zip(group, slots, strict=True):
                    if step.bound is not slot:
                        # Ctrl-C may leave some tensors of one bound, and some of the other.
                        step.bound = None
                        slot.bind(step.binding, step.names, self._engine.kinds[layer])
                        step.bound = slot
                    run_graph(step.graph, step.session, step.binding)
                    step.outputs[in_order.index(expert)] = step.output[0]

    def _guess(self, step: _BoundStep | _BoundExperts) -> None:
        """Have read what later layers will probably need, while this step's experts run."""
        pager = self._engine.pager
        for guess in step.guesses:
            if pager.guesses(guess.layer):
                for name, copied in guess.copied:
                    guess.binding.bind_ortvalue_input(name, copied)
                run_graph(guess.graph, guess.session, guess.binding)
                pager.guess(guess.layer, guess.ids[0].tolist())

    def _rebind(self, step: _BoundStep, slots: list[Slot]) -> None:
        for position, slot in enumerate(slots):
            if step.bound[position] is not slot:
                step.bound[position] = None
                slot.bind(step.binding, step.names[position], self._engine.kinds[step.layer])
                step.bound[position] = slot

    def _allocate(self, step: Step) -> None:
        """A buffer for every value the step produces, of the shape its graph declares."""
        if isinstance(step, ExpertsStep):
            self._values[step.y] = self._expert_output(step)
            return
        declared = {
            output.name: output for output in self._engine.sessions.get(step.graph).get_outputs()
        }
        for name, value in step.outputs.items():
            if value in self._engine.manifest.plan.state:
                continue
            shape = [dim if isinstance(dim, int) else 1 for dim in declared[name].shape]
            self._values[value] = np.zeros(shape, dtype=_ONNX_TYPES[declared[name].type])
        for layer, names in self._engine.pooled_routes(step).items():
            span = self._engine.served_tokens.spans[layer]
            for value, chosen in zip(names, self._routes, strict=True):
                if (found := self._values[value].dtype) != chosen.dtype:
                    raise GraphError(
                        f"{step.graph}: {value}: expected {chosen.dtype}, found {found}"
                    )
                self._values[value] = chosen[None, span]

    def _place(self, guess: Guess, steps: Sequence[Step]) -> None:
        """Have the guess made as early as it can be: before the first experts that run after
        all it reads is there, if they are not those it is about."""
        missing = set(guess.inputs.values()) - self._engine.manifest.plan.state.keys()
        missing -= self._engine.manifest.plan.inputs.keys()
        for at, step in enumerate(steps):
            experts = step if isinstance(step, ExpertsStep) else step.experts
            if experts is not None and not missing:
                if experts.layer != guess.layer:
                    for side in (0, 1):
                        self._sides[side][at].guesses.append(self._bind_guess(guess, side))
                return
            missing -= {step.y} if isinstance(step, ExpertsStep) else set(step.outputs.values())

    def _bind_guess(self, guess: Guess, side: int) -> _BoundGuess:
        session = self._engine.sessions.get(guess.graph)
        binding = session.io_binding()
        read = {**self._values, **self._state.sides[side]}
        given = {name: read[value] for name, value in guess.inputs.items()}
        copied = self._bind_inputs(binding, given)
        for name, tensor in guess.weights.items():
            binding.bind_ortvalue_input(name, self._engine.weight(tensor))
        (declared,) = [one for one in session.get_outputs() if one.name == guess.ids]
        ids = np.zeros(declared.shape, dtype=np.int64)
        binding.bind_ortvalue_output(guess.ids, _value(ids))
        return _BoundGuess(guess.layer, guess.graph, session, binding, ids, copied)

    def _expert_output(self, step: ExpertsStep) -> Array:
        """Room for one token's `y`, as wide as the graph says, or as its input."""
        graph = self._engine.kinds[step.layer].graph
        declared = self._engine.sessions.get(graph).get_outputs()[0].shape[-1]
        width = declared if isinstance(declared, int) else self._values[step.x].shape[1]
        return np.zeros((1, width), dtype=np.float32)

    def _bind_experts(self, step: ExpertsStep, side: int) -> _BoundExperts:
        engine = self._engine
        kind = engine.kinds[step.layer]
        session = engine.sessions.get(kind.graph)
        binding = session.io_binding()
        read = {**self._values, **self._state.sides[side]}
        inputs = {"x": step.x, **step.inputs}
        growing = [(name, value) for name, value in inputs.items() if value in self._rows]
        given = {name: read[value] for name, value in inputs.items() if value not in self._rows}
        copied = self._bind_inputs(binding, given)
        output = self._expert_output(step)
        binding.bind_ortvalue_output("y", _value(output))
        return _BoundExperts(
            step,
            kind.graph,
            session,
            binding,
            read[step.ids],
            read[step.gates],
            self._values[step.y],
            output,
            np.zeros((read[step.ids].shape[1], output.shape[1]), dtype=np.float32),
            tuple(spec.name for spec in kind.tensors),
            given,
            growing,
            copied,
        )

    def _bind_inputs(
        self, binding: ort.IOBinding, given: Mapping[str, Array]
    ) -> list[tuple[str, ort.OrtValue]]:
        """Bind arrays whose content changes; those that are to be bound again before every run."""
        values = [(name, _value(array)) for name, array in given.items()]
        for name, value in values:
            binding.bind_ortvalue_input(name, value)
        return values if self._engine.sessions.device.copies else []

    def _bind(self, step: Step, side: int) -> _BoundStep | _BoundExperts:
        if isinstance(step, ExpertsStep):
            return self._bind_experts(step, side)
        engine, state = self._engine, self._state
        session = engine.sessions.get(step.graph)
        binding = session.io_binding()
        read = {**self._values, **state.sides[side], **state.lengths}
        written = {**self._values, **self._rows, **state.sides[1 - side]}
        growing = [(name, value) for name, value in step.inputs.items() if value in self._rows]
        filled = {value: name for name, value in step.outputs.items() if value in state.buffers}
        buffers = [(n, filled[value], value) for n, value in step.inputs.items() if value in filled]
        given = {
            name: read[value]
            for name, value in step.inputs.items()
            if value not in self._rows and value not in filled
        }
        copied = self._bind_inputs(binding, given)
        for name, fixed in engine.fixed_inputs(step):
            binding.bind_ortvalue_input(name, fixed)
        for name, value in step.outputs.items():
            if value not in filled:
                binding.bind_ortvalue_output(name, _value(written[value]))
        if step.experts is None:
            return _BoundStep(
                step.graph, session, binding, -1, None, None, [], [], growing, buffers, copied
            )
        layer, ids = step.experts.layer, read[step.experts.ids]
        gates = read[step.experts.gates] if step.experts.gates else None
        names = engine.expert_inputs(layer, ids.shape[1])
        bound: list[Slot | None] = [None] * len(names)
        return _BoundStep(
            step.graph, session, binding, layer, ids, gates, names, bound, growing, buffers, copied
        )


def _value(array: Array) -> ort.OrtValue:
    # "f32" stands for every dtype numpy knows; bf16 never travels on the blackboard.
    return host_value(array, "f32")
