"""Nodes of an exported graph, with the subgraphs that they may have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import onnx


def taken(node: onnx.NodeProto) -> list[str]:
    """What a node takes, by name: its inputs, and what its subgraphs take from around them."""
    found = [name for name in node.input if name]
    for graph in _subgraphs(node):
        own = {one.name for one in (*graph.input, *graph.initializer)}
        for inner in graph.node:
            found += [name for name in taken(inner) if name not in own]
            own |= set(inner.output)
        found += [one.name for one in graph.output if one.name not in own]
    return found


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    graphs: list[onnx.GraphProto] = []
    for one in node.attribute:
        graphs += [one.g] if one.HasField("g") else one.graphs
    return graphs


def strip(nodes: Iterable[onnx.NodeProto]) -> None:
    """Take off what only says where nodes come from."""
    for node in nodes:
        del node.metadata_props[:]
        node.doc_string = ""
        for graph in _subgraphs(node):
            del graph.metadata_props[:]
            strip(graph.node)


def rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Let the nodes take other values: `names` from what they are called to what they will be."""
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        for graph in _subgraphs(node):
            rename(graph.node, names)


def join_reshapes(
    nodes: Iterable[onnx.NodeProto], constants: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Let a Reshape of a Reshape take what the first one takes.

    Only where its shape is one of `constants` and copies no dimension (0) of what it is given.
    """
    reshaped: dict[str, str] = {}
    for node in nodes:
        if (node.domain, node.op_type) != ("", "Reshape"):
            continue
        data, shape = node.input
        if shape in constants and (constants[shape] != 0).all():
            node.input[0] = reshaped.get(data, data)
        reshaped[node.output[0]] = node.input[0]


def domains(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Where the nodes' operators come from."""
    found = set()
    for node in nodes:
        found.add(node.domain)
        for graph in _subgraphs(node):
            found |= domains(graph.node)
    return found
