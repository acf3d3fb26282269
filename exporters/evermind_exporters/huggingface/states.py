"""The states of an imported model: its cache as the plan has it, and the nodes between the two.

transformers' graph takes token ids, positions and a cache; the plan has tokens and named states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import DType, StateSpec

from .attention import DOMAIN, LENGTH, OPERATOR

if TYPE_CHECKING:
    import onnx

TOKENS, LOGITS = "tokens", "logits"
#: How many tokens came before, `(1,)`: the length of every buffer that keeps them all.
PAST = "past"
#: The same as a state of its own, where every buffer has a window.
POSITION = "position"


def state_out(name: str) -> str:
    """The graph output that has a state's new rows."""
    return f"{name}.new"


@dataclass(frozen=True, slots=True)
class PlanStates:
    """What the plan keeps, and the graph's inputs and outputs that stand for it."""

    #: What the plan says of each state.
    specs: dict[str, StateSpec]
    #: State → graph input and output, of those that grow row by row.
    pairs: dict[str, tuple[str, str]]
    #: Graph inputs `(1, 1, tokens, 1)` of which only the length counts.
    lengths: tuple[str, ...]

    @property
    def buffer_lengths(self) -> list[str]:
        """The values that say how many rows of buffers are filled."""
        return sorted({spec.length for spec in self.specs.values() if spec.length})

    @property
    def positions(self) -> dict[str, tuple[int | str, ...]]:
        """What is made of the plan's inputs and lengths alone, and its shape."""
        each = {name: (1,) for past in self.buffer_lengths for name in _ends(past)}
        return {"position_ids": (1, "T"), **each}


def buffer_spec(heads: int, width: int, window: int, limit: int | None) -> StateSpec:
    """The state that keeps keys, or values, of attention that is a node."""
    most = {"window": window} if window else {"limit": limit or msgspec.UNSET}
    return StateSpec(dtype="f32", shape=(1, heads, "C", width), length=_past(window), **most)


def cache_spec(shape: Sequence[Any], grows: bool, limit: int | None) -> StateSpec:
    """The state that keeps another cache tensor `(1, heads, C, width)`, or `(1, …)` if fixed."""
    if not grows:
        return StateSpec(dtype="f32", shape=tuple(map(int, shape[1:])))
    rows = ("C", int(shape[1]), int(shape[3]))
    return StateSpec(dtype="f32", shape=rows, limit=limit or msgspec.UNSET)


def counter(specs: Iterable[StateSpec], limit: int | None) -> dict[str, StateSpec]:
    """The state that counts tokens, where those that grow forget them; else none."""
    if not all(spec.window for spec in specs if spec.grows):
        return {}
    return {POSITION: StateSpec(dtype="i64", shape=(1,), limit=limit or msgspec.UNSET)}


def plan_states(
    inputs: Mapping[str, tuple[Any, ...]],
    outputs: Sequence[str],
    nodes: Sequence[onnx.NodeProto],
    limit: int | None,
    buffers: DType = "f32",
) -> PlanStates:
    """What becomes of the graph's cache, of which `buffers` are of that dtype.

    Keys and values of attention that is a node (`attention.py`) are buffers `(1, heads, C,
    width)`. Another cache tensor `(1, heads, C, width)` becomes a state `(C, heads, width)`, and
    one of fixed shape `(1, …)` a state `(…)` that begins with zeros.
    """
    known = {"input_ids", "position_ids"}
    past = [name for name in inputs if name not in known]
    present = [name for name in outputs if name != LOGITS]
    if not known <= inputs.keys() or LOGITS not in outputs or len(past) != len(present):
        raise UnsupportedError(
            f"the exported graph: expected token ids, positions and a cache to logits, found "
            f"{', '.join(inputs)} to {', '.join(outputs)}"
        )
    if not past:
        raise UnsupportedError("the exported graph has no cache")
    specs: dict[str, StateSpec] = {}
    pairs, lengths = {}, []
    for node in nodes:
        if _is_attention(node):
            one = _options(node)
            spec = buffer_spec(one["kv_num_heads"], one["width"], one["window"], limit)
            spec = msgspec.structs.replace(spec, dtype=buffers)
            specs |= {_keys(one): spec, _values(one): spec}
    for number, (before, after) in enumerate(zip(past, present, strict=True)):
        shape = inputs[before]
        known_dims = [isinstance(dim, int) for dim in shape]
        grows = known_dims == [True, True, False, True]
        fits = len(shape) > 1 and shape[0] == 1 and (grows or all(known_dims))
        if before.replace("input.", "", 1) != after.replace("output.", "", 1) or not fits:
            raise UnsupportedError(
                f"state {before}: expected a cache that grows along its third dimension, or of "
                f"fixed shape, found {[str(dim) for dim in shape]} and {after}"
            )
        if before.endswith(f".{LENGTH}"):
            lengths.append(before)
            continue
        name = f"cache.{number}"
        pairs[name] = before, after
        specs[name] = cache_spec(shape, grows, limit)
    if not any(spec.grows for spec in specs.values()):
        raise UnsupportedError("the exported graph has no cache that grows with every token")
    specs |= counter(specs.values(), limit)
    return PlanStates(specs, pairs, tuple(lengths))


def with_plan_values(
    nodes: list[onnx.NodeProto],
    states: PlanStates,
    constants: dict[str, npt.NDArray[Any]],
) -> list[onnx.NodeProto]:
    """The nodes between the plan's values (tokens, states, logits) instead of transformers'."""
    from onnx import helper

    def ints(*values: int) -> str:
        name = f"plan_ints_{'_'.join(map(str, values))}"
        constants[name] = np.array(values, dtype=np.int64)
        return name

    constants["plan_one"] = np.array(1, dtype=np.int64)
    attention = [node for node in nodes if _is_attention(node)]
    # All that keep every row are equally long: no segment needs another's to know how long.
    if states.lengths:
        past = POSITION if POSITION in states.specs else PAST
        length = helper.make_node("Identity", [past], ["plan_length"])
    else:
        first = next(name for name in states.pairs if states.specs[name].grows)
        length = helper.make_node("Shape", [first], ["plan_length"], start=0, end=1)
    before = [
        helper.make_node("Unsqueeze", [TOKENS, ints(0)], ["input_ids"]),
        helper.make_node("Shape", [TOKENS], ["plan_count"], start=0, end=1),
        length,
        helper.make_node("Squeeze", ["plan_count"], ["plan_tokens"]),
        helper.make_node("Squeeze", ["plan_length"], ["plan_past"]),
        helper.make_node("Add", ["plan_tokens", "plan_past"], ["plan_end"]),
        helper.make_node("Range", ["plan_past", "plan_end", "plan_one"], ["plan_positions"]),
        helper.make_node("Unsqueeze", ["plan_positions", ints(0)], ["position_ids"]),
    ]
    for past in states.buffer_lengths:
        # GroupQueryAttention counts in int32, and by the last row.
        last, total = _ends(past)
        before += [
            helper.make_node("Add", [past, "plan_count"], [f"{total}.long"]),
            helper.make_node("Cast", [f"{total}.long"], [total], to=6),
            helper.make_node("Sub", [f"{total}.long", ints(1)], [f"{last}.long"]),
            helper.make_node("Cast", [f"{last}.long"], [last], to=6),
        ]
    after = [helper.make_node("Squeeze", ["plan_logits", ints(0)], [LOGITS])]
    if POSITION in states.specs:
        after.append(helper.make_node("Add", [POSITION, "plan_count"], [state_out(POSITION)]))
    renamed = {LOGITS: "plan_logits"}
    known = {("input_ids", 1): "plan_count"} | {(name, 2): "plan_length" for name in states.lengths}
    for name, (past, present) in states.pairs.items():
        if not states.specs[name].grows:
            before.append(helper.make_node("Unsqueeze", [name, ints(0)], [past]))
            after.append(helper.make_node("Squeeze", [present, ints(0)], [state_out(name)]))
            continue
        before += [
            helper.make_node("Transpose", [name], [f"{name}.heads"], perm=[1, 0, 2]),
            helper.make_node("Unsqueeze", [f"{name}.heads", ints(0)], [past]),
        ]
        after += [
            helper.make_node(
                "Slice", [present, "plan_length", ints(2**62), ints(2)], [f"{name}.rows"]
            ),
            helper.make_node("Squeeze", [f"{name}.rows", ints(0)], [f"{name}.squeezed"]),
            helper.make_node("Transpose", [f"{name}.squeezed"], [state_out(name)], perm=[1, 0, 2]),
        ]
        known[past, 2] = "plan_length"
    middle = []
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        if node.op_type == "Shape":
            ends = {one.name: one.i for one in node.attribute}
            begin = ends.get("start", 0)
            dimension = known.get((node.input[0], begin))
            if dimension and ends.get("end") == begin + 1:
                node = helper.make_node("Identity", [dimension], node.output)
        middle.append(_with_cache(node) if _is_attention(node) else node)
    chunks = {options["window"] for node in attention if (options := _options(node))["chunked"]}
    for size in sorted(chunks):
        before += _chunk_nodes(size, ints, constants)
    return before + middle + after


def _with_cache(node: onnx.NodeProto) -> onnx.NodeProto:
    """The attention node as the operator that keeps keys and values in the plan's buffers."""
    from onnx import helper

    one = _options(node)
    keys, values = _keys(one), _values(one)
    bias = _chunk_bias(one["window"]) if one["chunked"] else ""
    sinks = node.input[3] if len(node.input) > 3 else ""
    ends = _ends(_past(one["window"]))
    given = [*node.input[:3], keys, values, *ends, "", "", "", bias, sinks]
    while not given[-1]:
        given.pop()
    options = {name: one[name] for name in ("num_heads", "kv_num_heads", "scale")}
    if one["window"] and not one["chunked"]:
        options["local_window_size"] = one["window"]
    if one["softcap"]:
        options["softcap"] = one["softcap"]
    return helper.make_node(
        "GroupQueryAttention",
        given,
        [node.output[0], state_out(keys), state_out(values)],
        domain="com.microsoft",
        **options,
    )


def _is_attention(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, OPERATOR)


def _options(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _chunk_nodes(
    size: int, ints: Callable[..., str], constants: dict[str, npt.NDArray[Any]]
) -> list[onnx.NodeProto]:
    """What is added to products of queries and keys `(1, 1, T, rows)`, that a token sees its chunk.

    A row's position is told from the end, as those before it may have been forgotten.
    """
    from onnx import helper

    bias = _chunk_bias(size)
    constants |= {
        "plan_zero": np.array(0, dtype=np.int64),
        # Of chunks that are seen and not; not infinite, as that may become NaN.
        "plan_seen": np.array(0, dtype=np.float32),
        "plan_unseen": np.array(np.finfo(np.float32).min / 2, dtype=np.float32),
    }
    length = ints(size)
    nodes = [
        ("Add", [_past(size), "plan_count"], "rows"),
        ("Squeeze", [f"{bias}.rows"], "row_count"),
        ("Range", ["plan_zero", f"{bias}.row_count", "plan_one"], "row"),
        ("Sub", ["plan_end", f"{bias}.row_count"], "first"),
        ("Add", [f"{bias}.row", f"{bias}.first"], "position"),
        ("Div", [f"{bias}.position", length], "key_chunk"),
        ("Div", ["plan_positions", length], "query_chunk"),
        ("Unsqueeze", [f"{bias}.query_chunk", ints(1)], "query_chunks"),
        ("Equal", [f"{bias}.query_chunks", f"{bias}.key_chunk"], "same"),
        ("Where", [f"{bias}.same", "plan_seen", "plan_unseen"], "two"),
    ]
    made = [helper.make_node(kind, given, [f"{bias}.{name}"]) for kind, given, name in nodes]
    return [*made, helper.make_node("Unsqueeze", [f"{bias}.two", ints(0, 1)], [bias])]


def _chunk_bias(size: int) -> str:
    return f"chunk.{size}"


def _past(window: int) -> str:
    return f"{PAST}.{window}" if window else PAST


def _ends(past: str) -> tuple[str, str]:
    """The values that tell a node where its rows end, of how many there were before."""
    return f"{past}.last", f"{past}.total"


def _keys(options: Mapping[str, Any]) -> str:
    return f"keys.{options['layer']}"


def _values(options: Mapping[str, Any]) -> str:
    return f"values.{options['layer']}"
