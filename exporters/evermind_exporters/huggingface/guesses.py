"""Guesses of what an imported model's next router will choose, from the router itself.

What a layer's experts and router see changes little from one layer to the next, for both add to
the same residual: the router run on what the layer before showed its experts names most of what
it will choose (the idea: Eliseev and Mazur, arXiv 2312.17238). So a guess is the router's own
nodes, cut out of the graph; a router that reads anything else is not guessed.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

from ..onnx_graph import copy_node
from .nodes import rename, taken

if TYPE_CHECKING:
    import onnx


def guess_x(layer: int) -> str:
    """What the guess of a layer takes: the row `(1, width)` that the experts before it see."""
    return f"guess.{layer}.x"


def guess_ids(layer: int) -> str:
    """What it gives: `(1, top_k)`."""
    return f"guess.{layer}.ids"


def guess_nodes(
    nodes: Sequence[onnx.NodeProto], layer: int, x: str, ids: str, constants: Container[str]
) -> list[onnx.NodeProto]:
    """The nodes from `x`, which the layer's experts see, to `ids`, which it is routed to.

    They take `guess_x` and give `guess_ids`. Empty where `ids` depends on more than that.
    """
    producer = {name: node for node in nodes for name in node.output if name}
    shown = {x, *_reshaped(x, producer)}
    kept: set[int] = set()
    pending, reached = [ids], False
    while pending:
        name = pending.pop()
        if name in shown:
            reached = True
        elif name in producer:
            if id(producer[name]) not in kept:
                kept.add(id(producer[name]))
                pending += taken(producer[name])
        elif name not in constants:
            return []
    if not reached:
        return []
    names = {name: guess_x(layer) for name in shown} | {ids: guess_ids(layer)}
    return [_renamed(node, names) for node in nodes if id(node) in kept]


def _reshaped(name: str, producer: Mapping[str, onnx.NodeProto]) -> list[str]:
    """What `name` is a reshaped form of."""
    found = []
    while name in producer and producer[name].op_type == "Reshape":
        name = producer[name].input[0]
        found.append(name)
    return found


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    copy = copy_node(node)
    rename([copy], names)
    copy.output[:] = [names.get(name, name) for name in copy.output]
    return copy
