"""What every Tilelli block is in a package: its router's graph, its units and its steps.

A block's pathways are layers of the manifest, its banks their experts: the router's choice of
bank is the one expert a token is routed to, the pathway's weight its gate. A weight of 0 needs
no unit. The state is the block's normed inputs so far, which all banks share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from evermind_manifests.manifest import ExpertsStep, GraphStep, Layer, StateSpec, Step, ValueSpec

from ...blueprint import KindBlueprint, Tensors
from ...family import Arrays
from ...onnx_graph import GraphBuilder
from ..linear import Weight
from .params import BlockDims, unit_parameters
from .pathways import CONTEXT, matrices, pathway_kind, scope_of
from .storage import Matrix, MatrixSpec

# Source: specs/tilelli.md, section 3.
EPSILON: Final = 1e-5
_LEAST_SUM: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a model. `prefix` is that of its tensors, `number` its place."""

    dims: BlockDims
    storage: str
    number: int
    prefix: str
    router: str

    @property
    def first_layer(self) -> int:
        """The manifest's layer of the first pathway."""
        return self.number * len(self.dims.pathways)

    @property
    def base(self) -> str:
        """The blackboard value of the block's input `(T, d)`."""
        return f"x.{self.number}"

    @property
    def parts(self) -> list[str]:
        """The values that add up to the block's output: its input and its pathways'."""
        return [self.base, *(f"e.{layer.layer}" for layer in self.layers())]

    def layers(self) -> list[Layer]:
        """One layer for each pathway."""
        return [
            Layer(layer=self.first_layer + at, kind=pathway, experts=self.dims.banks, top_k=1)
            for at, pathway in enumerate(self.dims.pathways)
        ]

    def unit_names(self, layer: int, bank: int) -> dict[str, str]:
        """Tensor → the model's tensor, for all of a unit's."""
        pathway = self.dims.pathways[layer - self.first_layer]
        prefix = self.prefix + self.dims.unit_prefix(pathway, bank)
        return {name: prefix + name for name in self.dims.unit_shapes(pathway)}

    def copied(self, layer: int, bank: int) -> dict[str, str]:
        """Those of `unit_names` that a shard holds as they are."""
        names = self.unit_names(layer, bank)
        return {tensor: name for tensor, name in names.items() if not self.dims.quantised(tensor)}

    def computed(self, tensors: Tensors, layer: int, bank: int) -> Arrays:
        """A shard's quantised tensors. Raises `CheckpointError`."""
        pathway = self.dims.pathways[layer - self.first_layer]
        names = self.unit_names(layer, bank)
        arrays: Arrays = {}
        for tensor, spec in matrices(self.dims, pathway, self.storage).items():
            if spec.quantised:
                where = names[tensor]
                recovered = self.dims.recovered
                arrays |= spec.arrays(tensors[where], recovered=recovered, where=where)
        return arrays

    def resident_names(self) -> list[str]:
        """The block's tensors that stay in memory as they are."""
        names = [f"{self.prefix}norm.weight", f"{self.prefix}norm.bias"]
        return names if self.dims.quantize else [*names, self.prefix + self.router]

    def computed_resident(self, tensors: Tensors) -> Arrays:
        """The quantised router. Raises `CheckpointError`."""
        if not self.dims.quantize:
            return {}
        name = self.prefix + self.router
        return self._router().arrays(tensors[name], recovered=self.dims.recovered, where=name)

    def route(self, b: GraphBuilder, x: str, weight: Mapping[str, Weight]) -> None:
        """Norm and router of the block's input `x`, and the outputs `self.outputs()` names."""
        dims = self.dims
        width, count, banks = dims.d_model, len(dims.pathways), dims.banks
        n = b.op(
            "LayerNormalization",
            x,
            b.weight(f"{self.prefix}norm.weight"),
            b.weight(f"{self.prefix}norm.bias"),
            axis=-1,
            epsilon=EPSILON,
        )
        logits = Matrix(b, self._router(), weight).linear(n)
        probabilities = b.op("Softmax", logits, axis=-1)
        shared = b.op("Reshape", probabilities, b.const([-1, count, banks]))
        shared = b.op("ReduceSum", shared, b.const([2]), keepdims=0)
        kept = self._kept(b, probabilities)
        by_bank = b.op("Reshape", kept, b.const([-1, count, banks]))
        weights = b.op("ReduceSum", by_bank, b.const([2]), keepdims=0)
        bank = b.op("ArgMax", by_bank, axis=2, keepdims=0)
        logs = b.op("Log", b.op("Max", shared, b.const(_LEAST_SUM, np.float32)))
        entropy = b.op("ReduceSum", b.op("Mul", shared, logs), b.const([1]), keepdims=0)

        b.output(x, "x_out", "f32", ["T", width])
        b.output(n, "n_out", "f32", ["T", width])
        if self.state():
            b.output(n, "h_out", "f32", ["T", width])
        b.output(probabilities, "probabilities", "f32", ["T", dims.columns])
        b.output(kept, "kept", "f32", ["T", dims.columns])
        b.output(shared, "shared", "f32", ["T", count])
        b.output(b.op("Neg", entropy), "entropy", "f32", ["T"])
        b.output(weights, "weights", "f32", ["T", count])
        b.output(bank, "bank", "i64", ["T", count])
        for at in range(count):
            begin, end, axis = b.const([at]), b.const([at + 1]), b.const([1])
            b.output(b.op("Slice", bank, begin, end, axis), f"ids_{at}", "i64", ["T", 1])
            b.output(b.op("Slice", weights, begin, end, axis), f"gates_{at}", "f32", ["T", 1])

    def outputs(self) -> dict[str, str]:
        """Output of `route` → blackboard value."""
        number = self.number
        result = {
            "x_out": self.base,
            "n_out": f"n.{number}",
            **({"h_out": f"h.{number}"} if self.state() else {}),
            "probabilities": f"probabilities.{number}",
            "kept": f"kept.{number}",
            "shared": f"shared.{number}",
            "entropy": f"entropy.{number}",
            "weights": f"weights.{number}",
            "bank": f"bank.{number}",
        }
        for at, layer in enumerate(self.layers()):
            result |= {f"ids_{at}": f"ids.{layer.layer}", f"gates_{at}": f"gates.{layer.layer}"}
        return result

    def steps(self, graph: str, inputs: Mapping[str, str]) -> list[Step]:
        """The block's steps: its graph, then its pathways."""
        steps: list[Step] = [GraphStep(graph=graph, inputs=dict(inputs), outputs=self.outputs())]
        for layer in self.layers():
            whole = scope_of(layer.kind) == "sequence"
            steps.append(
                ExpertsStep(
                    layer=layer.layer,
                    x=f"n.{self.number}",
                    ids=f"ids.{layer.layer}",
                    gates=f"gates.{layer.layer}",
                    y=f"e.{layer.layer}",
                    inputs={CONTEXT: f"h.{self.number}"} if whole else {},
                )
            )
        return steps

    def state(self) -> dict[str, StateSpec]:
        """The block's history, if a pathway looks at it."""
        if all(scope_of(pathway) == "token" for pathway in self.dims.pathways):
            return {}
        return {f"h.{self.number}": StateSpec(dtype="f32", shape=("C", self.dims.d_model))}

    def routes(self) -> dict[str, ValueSpec]:
        """`ids.{layer}` and `gates.{layer}` as outputs of the plan."""
        result = {}
        for layer in self.layers():
            result[f"ids.{layer.layer}"] = ValueSpec(dtype="i64", shape=("T", 1))
            result[f"gates.{layer.layer}"] = ValueSpec(dtype="f32", shape=("T", 1))
        return result

    def unused_parameters(self) -> int:
        """Scalars that a token passes by: other banks, and pathways left out."""
        dims = self.dims
        running = sorted((unit_parameters(dims, name) for name in dims.pathways), reverse=True)
        if 0 < dims.top_k_routing < dims.columns:
            running = running[: dims.top_k_routing]
        stored = sum(unit_parameters(dims, name) for name in dims.stored) * dims.banks
        return stored - sum(running)

    def _kept(self, b: GraphBuilder, probabilities: str) -> str:
        """The router's weights after what is left out of them."""
        dims = self.dims
        if dims.threshold > 0:
            least = b.const(dims.threshold, np.float32)
            enough = b.op("GreaterOrEqual", probabilities, least)
            return str(b.op("Where", enough, probabilities, b.const(0.0, np.float32)))
        if not 0 < dims.top_k_routing < dims.columns:
            return probabilities
        best, chosen = b.op(
            "TopK", probabilities, b.const([dims.top_k_routing]), outputs=2, axis=-1
        )
        empty = b.op("Expand", b.const(0.0, np.float32), b.op("Shape", probabilities))
        kept = b.op("ScatterElements", empty, chosen, best, axis=1)
        total = b.op("ReduceSum", kept, b.const([1]), keepdims=1)
        return str(b.op("Div", kept, b.op("Max", total, b.const(_LEAST_SUM, np.float32))))

    def _router(self) -> MatrixSpec:
        """Always plain: it is small, and every token needs it."""
        name = self.prefix + self.router
        shape = (self.dims.columns, self.dims.d_model)
        return MatrixSpec(name, shape, self.dims.quantize, self.dims.per_row, "f32")


def kinds(dims: BlockDims, storage: str) -> dict[str, KindBlueprint]:
    """The kinds of all pathways that run."""
    return {pathway: pathway_kind(dims, pathway, storage) for pathway in dims.pathways}
