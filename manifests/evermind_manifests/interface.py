"""Do the graphs fit the plan? Names, dtypes and known dimensions of everything bound.

Pure: takes what `graph.inspect_graph` and `safetensors_header.read_header` found.
"""

from __future__ import annotations

import posixpath
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from .dtypes import ITEMSIZE
from .errors import GraphError
from .graph import GraphDims, GraphInfo, GraphValue
from .manifest import (
    EXTERNAL_EXPERT_LOCATION,
    ExpertsStep,
    GraphStep,
    Kind,
    Layer,
    Manifest,
    Plan,
    Pool,
    Step,
)
from .problems import Problem, problem, raise_errors
from .safetensors_header import TensorRange
from .structure import programs
from .variants import each_variant

# The inputs of all graph steps together, each graph counted as often as it runs. A thousand
# layers of 64 fused experts with six tensors each have a tenth of this.
MAX_STEP_INPUTS: Final = 1 << 22
_NAMES_SHOWN = 5
# Values between steps lie in numpy's arrays, which have no bfloat16.
_BETWEEN: Final = ITEMSIZE.keys() - {"bf16"}


def external_locations(manifest: Manifest, path: str) -> dict[str, int]:
    """Which locations the external data of the graph `path` may name, with their sizes.

    A kind's `graph_external` reads `expert.bin`, any other graph the resident file, by its
    path relative to the graph.
    """
    for kind in manifest.kinds.values():
        if kind.graph_external == path:
            return {EXTERNAL_EXPERT_LOCATION: kind.bytes}
    if manifest.resident is None or manifest.resident not in manifest.files:
        return {}
    location = posixpath.relpath(manifest.resident, posixpath.dirname(path) or ".")
    return {location: manifest.files[manifest.resident].bytes}


def interface_problems(
    manifest: Manifest, graphs: Mapping[str, GraphInfo], resident: Mapping[str, TensorRange] | None
) -> list[Problem]:
    """Every place where graphs, plan, kinds and resident tensors do not fit together.

    `graphs` has the graphs that could be read; `resident` is None if its header could not.
    """
    problems = _fit(manifest, graphs, resident)
    for where, variant in each_variant(manifest):
        found = _fit(variant, graphs, resident)
        problems += [replace(one, place=where + one.place) for one in found]
    external = {kind.graph_external for kind in manifest.kinds.values()}
    if resident is not None:
        ranges = _Ranges((tensor.dtype, tensor.begin, tensor.end) for tensor in resident.values())
        for path, info in graphs.items():
            if path not in external:
                problems += _check_ranges(path, info, ranges)
    return problems


def _fit(
    manifest: Manifest, graphs: Mapping[str, GraphInfo], resident: Mapping[str, TensorRange] | None
) -> list[Problem]:
    """`interface_problems` of the manifest's own programs."""
    problems: list[Problem] = []
    more = _more_inputs(manifest)
    for name, kind in manifest.kinds.items():
        problems += _check_kind(f"kinds[{name!r}]", kind, more.get(name, set()), graphs)
    for program, steps in programs(manifest.plan):
        problems += _Program(manifest, graphs, resident, f"plan.{program}").check(steps)
    return problems


def check_graph_interface(manifest: Manifest, path: str, info: GraphInfo) -> None:
    """Raise `GraphError` where the graph `path` does not fit the steps and kinds that use it.

    For a runtime about to make a session: what other graphs and the resident file hold is
    not known here, so values that pass between graphs are compared by `interface_problems`
    only. `manifest` has passed `check_structure`.
    """
    raise_errors(interface_problems(manifest, {path: info}, None), path, GraphError)


def _more_inputs(manifest: Manifest) -> dict[str, set[str]]:
    """By kind, the inputs that experts steps bind to its graph besides `x`."""
    kinds = {entry.layer: entry.kind for entry in manifest.layers}
    found: dict[str, set[str]] = {}
    for _, steps in programs(manifest.plan):
        for step in steps:
            if isinstance(step, ExpertsStep) and step.layer in kinds:
                found.setdefault(kinds[step.layer], set()).update(step.inputs)
    return found


def _check_kind(
    place: str, kind: Kind, more: set[str], graphs: Mapping[str, GraphInfo]
) -> Iterator[Problem]:
    tensors: dict[str, GraphValue] = {
        spec.name: GraphValue(spec.name, spec.dtype, spec.shape) for spec in kind.tensors
    }
    info = graphs.get(kind.graph)
    if info is not None:
        where = f"{place}.graph ({kind.graph})"
        yield from _check_bound(where, info, {"x", *tensors, *more}, {"y"})
        for name, tensor in tensors.items():
            yield from _check_match(where, name, tensor, info.inputs.get(name))
    info = graphs.get(kind.graph_statistics or "")
    if info is not None:
        where = f"{place}.graph_statistics ({kind.graph_statistics})"
        yield from _check_bound(where, info, {"x", *tensors, *more}, {"y"})
        for name, tensor in tensors.items():
            yield from _check_match(where, name, tensor, info.inputs.get(name))
        for name, value in info.outputs.items():
            if name != "y":
                yield from _check_match(where, name, GraphValue(name, "f32", (None,)), value)
    info = graphs.get(kind.graph_external or "")
    if info is not None and kind.graph_external is not None:
        where = f"{place}.graph_external ({kind.graph_external})"
        yield from _check_bound(where, info, {"x", *more}, {"y"})
        ranges = _Ranges(
            (spec.dtype, spec.offset, spec.offset + spec.bytes) for spec in kind.tensors
        )
        yield from _check_ranges(kind.graph_external, info, ranges)


class _Ranges:
    """Ranges that do not overlap, by dtype; finds the one around another in O(log n)."""

    def __init__(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        self._by_dtype: dict[str, list[tuple[int, int]]] = {}
        for dtype, begin, end in ranges:
            self._by_dtype.setdefault(dtype, []).append((begin, end))
        for found in self._by_dtype.values():
            found.sort()

    def hold(self, dtype: str, begin: int, end: int) -> bool:
        ranges = self._by_dtype.get(dtype, [])
        after = bisect_right(ranges, begin, key=lambda item: item[0])
        return after > 0 and end <= ranges[after - 1][1]


def _check_ranges(path: str, info: GraphInfo, ranges: _Ranges) -> Iterator[Problem]:
    """Each external initializer lies inside one tensor of its dtype (a tile is a part of it)."""
    for tensor in info.external:
        end = tensor.offset + tensor.length
        if not ranges.hold(tensor.dtype, tensor.offset, end):
            yield problem(
                "graph-external",
                f"{path}: tensor {tensor.name!r}",
                f"{tensor.location}, bytes {tensor.offset} to {end}: not inside one {tensor.dtype}"
                " tensor",
            )


def _check_bound(
    place: str, info: GraphInfo, inputs: set[str], outputs: set[str]
) -> Iterator[Problem]:
    """The graph's inputs are exactly those bound, its outputs at least those read."""
    for names, what in (
        (inputs - info.inputs.keys(), "the graph has no input"),
        (info.inputs.keys() - inputs, "nothing is bound to the graph's input"),
        (outputs - info.outputs.keys(), "the graph has no output"),
    ):
        if names:
            yield problem("graph-interface", place, f"{what} {_listed(names)}")


def _listed(names: Collection[str]) -> str:
    more = f" (and {len(names) - _NAMES_SHOWN} more)" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, sorted(names)[:_NAMES_SHOWN])) + more


def _check_match(
    place: str, name: str, expected: GraphValue | None, found: GraphValue | None
) -> Iterator[Problem]:
    """The dtypes are equal, and the dimensions wherever both are numbers."""
    if expected is None or found is None:
        return
    if expected.dtype != found.dtype or not _fits(expected.dims, found.dims):
        yield problem(
            "graph-interface",
            place,
            f"{name!r}: expected {_describe(expected)}, found {_describe(found)}",
        )


def _fits(one: GraphDims | None, other: GraphDims | None) -> bool:
    if one is None or other is None:
        return True
    return len(one) == len(other) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(one, other, strict=True)
    )


def _describe(value: GraphValue) -> str:
    dims = "any shape" if value.dims is None else f"[{', '.join(map(str, value.dims))}]"
    return f"{value.dtype} {dims}"


class _Program:
    """Walks one program with the type of every value on the blackboard."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: Mapping[str, GraphInfo],
        resident: Mapping[str, TensorRange] | None,
        place: str,
    ) -> None:
        self._kinds = manifest.kinds
        self._layers: dict[int, Layer] = {entry.layer: entry for entry in manifest.layers}
        self._graphs = graphs
        self._resident = resident
        self._plan: Plan = manifest.plan
        self._place = place
        plan = manifest.plan
        self._board: dict[str, GraphValue] = {
            name: GraphValue(name, spec.dtype, spec.shape) for name, spec in plan.inputs.items()
        }
        self._board |= {
            name: GraphValue(name, spec.dtype, spec.shape) for name, spec in plan.state.items()
        }
        self._board |= {name: GraphValue(name, "i64", (1,)) for name in plan.lengths}
        self._inputs = 0
        self._prefill = place == "plan.prefill"
        self._decode = place == "plan.decode"

    def check(self, steps: Sequence[Step]) -> Iterator[Problem]:
        for number, step in enumerate(steps):
            place = f"{self._place}[{number}]"
            if isinstance(step, ExpertsStep):
                yield from self._check_experts(place, step)
            elif step.graph in self._graphs:
                info = self._graphs[step.graph]
                self._inputs += len(info.inputs)
                if self._inputs > MAX_STEP_INPUTS:
                    yield problem(
                        "graph-interface", place, f"over {MAX_STEP_INPUTS:,} inputs up to here"
                    )
                    return
                yield from self._check_graph(f"{place} ({step.graph})", step, info)
        for name, spec in self._plan.outputs.items():
            expected = GraphValue(name, spec.dtype, spec.shape)
            found = self._board.get(spec.value or name)
            yield from _check_match(f"{self._place}: output", name, expected, found)
        if self._prefill:
            yield from self._check_observed()
        if self._decode:
            yield from self._check_guesses()

    def _check_guesses(self) -> Iterator[Problem]:
        for number, guess in enumerate(self._plan.guesses):
            info = self._graphs.get(guess.graph)
            if info is None:
                continue
            place = f"plan.guesses[{number}] ({guess.graph})"
            yield from _check_bound(place, info, {*guess.inputs, *guess.weights}, {guess.ids})
            for name, value in guess.inputs.items():
                yield from _check_match(place, name, info.inputs.get(name), self._board.get(value))
            for name, resident in guess.weights.items():
                yield from self._check_weight(place, resident, info.inputs.get(name))
            expected = GraphValue(guess.ids, "i64", (1, None))
            yield from _check_match(place, guess.ids, expected, info.outputs.get(guess.ids))

    def _check_observed(self) -> Iterator[Problem]:
        for name, spec in self._plan.observations.items():
            expected = GraphValue(name, spec.dtype, spec.shape)
            found = self._board.get(spec.value or name)
            yield from _check_match(f"{self._place}: observation", name, expected, found)
        for router in self._plan.routers:
            rows = (None, None)
            for name, dtype in (
                (router.ids, "i64"),
                (router.gates, "f32"),
                (router.probabilities, "f32"),
            ):
                place = f"{self._place}: router of layer {router.layer}"
                yield from _check_match(
                    place, name, GraphValue(name, dtype, rows), self._board.get(name)
                )

    def _check_experts(self, place: str, step: ExpertsStep) -> Iterator[Problem]:
        layer = self._layers.get(step.layer)
        top_k = layer.top_k if layer is not None else None
        kind = self._kinds.get(layer.kind) if layer is not None else None
        info = self._graphs.get(kind.graph) if kind is not None else None
        for name, dtype in ((step.ids, "i64"), (step.gates, "f32")):
            expected = GraphValue(name, dtype, (None, top_k))
            yield from _check_match(place, name, expected, self._board.get(name))
        if info is not None and kind is not None:
            bound = {"x", *step.inputs, *(spec.name for spec in kind.tensors)}
            yield from _check_bound(f"{place} ({kind.graph})", info, bound, {"y"})
            for name, value in {"x": step.x, **step.inputs}.items():
                yield from _check_match(place, name, info.inputs.get(name), self._board.get(value))
            yield from self._write(place, "y", step.y, info.outputs.get("y"))

    def _check_graph(self, place: str, step: GraphStep, info: GraphInfo) -> Iterator[Problem]:
        yield from self._check_bindings(place, step, info)
        for name, value in step.inputs.items():
            yield from _check_match(place, name, info.inputs.get(name), self._board.get(value))
        for name, resident in step.weights.items():
            yield from self._check_weight(place, resident, info.inputs.get(name))
        for name, pool in step.pools.items():
            yield from _check_match(place, name, self._pool(pool), info.inputs.get(name))
        if step.experts is not None:
            expected = GraphValue(step.experts.ids, "i64", None)
            ids = self._board.get(step.experts.ids)
            yield from _check_match(place, step.experts.ids, expected, ids)
        for name, value in step.outputs.items():
            found = info.outputs.get(name)
            state = self._plan.state.get(value)
            if found and found.dtype not in _BETWEEN and not (state and state.is_buffer):
                yield problem(
                    "graph-interface",
                    place,
                    f"{name!r}: expected one of {', '.join(sorted(_BETWEEN))} outside of buffers, "
                    f"found {found.dtype}",
                )
            yield from self._write(place, name, value, found)

    def _check_bindings(self, place: str, step: GraphStep, info: GraphInfo) -> Iterator[Problem]:
        """The names bound, and the types of the fused experts' tensors."""
        experts: dict[str, GraphValue] = {}
        layer = self._layers.get(step.experts.layer) if step.experts is not None else None
        kind = self._kinds.get(layer.kind) if layer is not None else None
        if layer is not None and kind is not None:
            # `top_k` may be any number: it is counted with only where the graph has the inputs.
            if layer.top_k * len(kind.tensors) > len(info.inputs):
                yield problem(
                    "graph-interface",
                    place,
                    f"top_k {layer.top_k} experts of {len(kind.tensors)} tensors are bound, the"
                    f" graph has {len(info.inputs)} inputs",
                )
                return
            experts = {
                f"expert{i}.{spec.name}": GraphValue(spec.name, spec.dtype, spec.shape)
                for spec in kind.tensors
                for i in range(layer.top_k)
            }
        bound = {*step.inputs, *step.weights, *step.pools, *experts}
        yield from _check_bound(place, info, bound, set(step.outputs))
        for name, tensor in experts.items():
            yield from _check_match(place, name, tensor, info.inputs.get(name))

    def _pool(self, pool: Pool) -> GraphValue | None:
        layer = self._layers.get(pool.layer)
        kind = self._kinds.get(layer.kind) if layer is not None else None
        if layer is None or kind is None:
            return None
        shapes = {spec.name: spec.shape for spec in kind.tensors}
        dims = (layer.experts, *shapes[pool.tensor]) if pool.tensor in shapes else None
        return GraphValue(pool.tensor, "f32", dims)

    def _check_weight(self, place: str, name: str, bound: GraphValue | None) -> Iterator[Problem]:
        if self._resident is None:
            return
        tensor = self._resident.get(name)
        if tensor is None:
            yield problem("graph-interface", place, f"there is no resident tensor {name!r}")
            return
        yield from _check_match(place, name, GraphValue(name, tensor.dtype, tensor.shape), bound)

    def _write(
        self, place: str, name: str, value: str, found: GraphValue | None
    ) -> Iterator[Problem]:
        """Note the type of `value`; a state keeps its own, and the old value is what is read."""
        state = self._plan.state.get(value)
        if state is not None:
            expected = GraphValue(value, state.dtype, state.shape)
            yield from _check_match(place, f"{name} -> {value}", expected, found)
        elif found is not None:
            self._board[value] = found
