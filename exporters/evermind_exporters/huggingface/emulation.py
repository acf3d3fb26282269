"""Half precision on a machine without kernels for it: float32 that is rounded after every node.

A node in half precision gives its float32 result rounded to it, give or take the last place. So a
graph whose every value is rounded in the same places computes what the other one would, and shows
whether its casts and types are right: for bfloat16, of which ONNX Runtime's CPU provider knows
little.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from evermind_manifests.manifest import GraphStep, Half, Manifest
from evermind_manifests.package import Package, open_package
from evermind_manifests.variants import computing
from msgspec.structs import replace

from ..onnx_graph import ONNX_DTYPES, copy_node

if TYPE_CHECKING:
    import onnx

_FLOAT = ONNX_DTYPES["f32"]
_EXACT, _ROUNDED, _WIDE = ".exact", ".rounded", ".wide"


def emulate(package: Path, compute: Half, folder: Path) -> None:
    """Write, into the empty `folder`, graphs in the place of those of a package's variant."""
    with open_package(package) as opened:
        variant = computing(opened.manifest, compute)
        for path in _graphs(variant):
            data = emulated_graph(opened.read_file(path), compute, {*variant.plan.state})
            (folder / path.rpartition("/")[2]).write_bytes(data)


class Emulated(Package):
    """A package whose variant `compute` runs on the CPU, through the graphs in `folder`."""

    def __init__(self, package: Package, compute: Half, folder: Path) -> None:
        manifest = computing(package.manifest, compute)
        state = {
            name: replace(spec, dtype="f32") if spec.dtype == compute else spec
            for name, spec in manifest.plan.state.items()
        }
        manifest = replace(manifest, plan=replace(manifest.plan, state=state))
        super().__init__(package.store, manifest, package.digest, compute)
        self._graphs = {path: folder / path.rpartition("/")[2] for path in _graphs(manifest)}

    def read_file(self, path: str) -> bytes:
        """See `Package.read_file`."""
        return self._graphs[path].read_bytes() if path in self._graphs else super().read_file(path)


def _graphs(manifest: Manifest) -> set[str]:
    plan = manifest.plan
    found = {one.graph for one in (*plan.prefill, *plan.decode) if isinstance(one, GraphStep)}
    found |= {guess.graph for guess in plan.guesses}
    return found | {kind.graph for kind in manifest.kinds.values()}


def emulated_graph(data: bytes, compute: Half, states: set[str]) -> bytes:
    """A graph with float32 in the place of `compute`, every value rounded to it.

    Inputs and initializers are what they were, but for `states`: a graph that keeps its buffers in
    half precision puts nothing else into them than what is rounded already.
    """
    import onnx

    model = onnx.ModelProto.FromString(data)
    graph, dtype = model.graph, ONNX_DTYPES[compute]
    typed = onnx.shape_inference.infer_shapes(model).graph.value_info
    half = {one.name for one in typed if one.type.tensor_type.elem_type == dtype}
    given = {one.name for one in graph.initializer if one.data_type == dtype}
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == dtype:
            if value.name in states or value in graph.output:
                value.type.tensor_type.elem_type = _FLOAT
            else:
                given.add(value.name)
    nodes = [*_widened(given), *(one for node in graph.node for one in _rounded(node, half, dtype))]
    for node in nodes[len(given) :]:
        node.input[:] = [name + _WIDE if name in given else name for name in node.input]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return bytes(model.SerializeToString(deterministic=True))


def _widened(names: set[str]) -> list[onnx.NodeProto]:
    from onnx import helper

    return [helper.make_node("Cast", [one], [one + _WIDE], to=_FLOAT) for one in sorted(names)]


def _rounded(node: onnx.NodeProto, half: set[str], dtype: int) -> Iterator[onnx.NodeProto]:
    """The node, and casts there and back of what it gives in half precision."""
    from onnx import helper

    copy = copy_node(node)
    rounded = [name for name in node.output if name in half]
    copy.output[:] = [name + _EXACT if name in half else name for name in copy.output]
    for one in copy.attribute:
        if one.name == "to" and one.i == dtype:
            one.i = _FLOAT
    yield copy
    for name in rounded:
        yield helper.make_node("Cast", [name + _EXACT], [name + _ROUNDED], to=dtype)
        yield helper.make_node("Cast", [name + _ROUNDED], [name], to=_FLOAT)
