"""The states of an imported model: its cache as the plan has it, and the nodes between the two.

transformers' graph takes token ids, positions and a cache; the plan has tokens and named states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import StateSpec

if TYPE_CHECKING:
    import onnx

TOKENS, LOGITS = "tokens", "logits"


def state_out(name: str) -> str:
    """The graph output that has a state's new rows."""
    return f"{name}.new"


def plan_states(
    inputs: Mapping[str, tuple[Any, ...]], outputs: Sequence[str], limit: int | None
) -> tuple[dict[str, tuple[str, str]], dict[str, StateSpec]]:
    """State → (graph input, graph output), and what the plan says of each.

    A cache tensor `(1, heads, C, width)` becomes a state `(C, heads, width)`, and one of fixed
    shape `(1, …)` a state `(…)` that begins with zeros.
    """
    import msgspec

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
    pairs, states = {}, {}
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
        name = f"cache.{number}"
        pairs[name] = before, after
        if grows:
            states[name] = StateSpec(
                dtype="f32",
                shape=("C", int(shape[1]), int(shape[3])),
                limit=limit if limit else msgspec.UNSET,
            )
        else:
            states[name] = StateSpec(dtype="f32", shape=tuple(map(int, shape[1:])))
    if not any(spec.grows for spec in states.values()):
        raise UnsupportedError("the exported graph has no cache that grows with every token")
    return pairs, states


def with_plan_values(
    nodes: list[onnx.NodeProto],
    pairs: Mapping[str, tuple[str, str]],
    constants: dict[str, npt.NDArray[Any]],
    states: Mapping[str, StateSpec],
) -> list[onnx.NodeProto]:
    """The nodes between the plan's values (tokens, states, logits) instead of transformers'."""
    from onnx import helper

    def ints(*values: int) -> str:
        name = f"plan_ints_{'_'.join(map(str, values))}"
        constants[name] = np.array(values, dtype=np.int64)
        return name

    for value, name in ((0, "plan_zero"), (1, "plan_one")):
        constants[name] = np.array(value, dtype=np.int64)
    first = next(name for name, spec in states.items() if spec.grows)
    before = [
        helper.make_node("Unsqueeze", [TOKENS, ints(0)], ["input_ids"]),
        helper.make_node("Shape", [TOKENS], ["plan_count"], start=0, end=1),
        helper.make_node("Shape", [first], ["plan_length"], start=0, end=1),
        helper.make_node("Squeeze", ["plan_count"], ["plan_tokens"]),
        helper.make_node("Squeeze", ["plan_length"], ["plan_past"]),
        helper.make_node("Add", ["plan_tokens", "plan_past"], ["plan_end"]),
        helper.make_node("Range", ["plan_past", "plan_end", "plan_one"], ["plan_positions"]),
        helper.make_node("Unsqueeze", ["plan_positions", ints(0)], ["position_ids"]),
    ]
    after = [helper.make_node("Squeeze", ["plan_logits", ints(0)], [LOGITS])]
    renamed = {LOGITS: "plan_logits"}
    # All that grow are equally long: no segment needs another's to know how long.
    lengths = {("input_ids", 1): "plan_count"}
    for name, (past, present) in pairs.items():
        if not states[name].grows:
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
        lengths[past, 2] = "plan_length"
    middle = []
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        if node.op_type == "Shape":
            ends = {one.name: one.i for one in node.attribute}
            begin = ends.get("start", 0)
            length = lengths.get((node.input[0], begin))
            if length and ends.get("end") == begin + 1:
                node = helper.make_node("Identity", [length], node.output)
        middle.append(node)
    return before + middle + after
