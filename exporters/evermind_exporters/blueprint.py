"""What a family's exporter hands over: graphs, plan and a way to get each expert's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests.manifest import DType, Layer, Plan
from evermind_manifests.shard import ShardLayout

from .checkpoints.params import Family
from .onnx_graph import ExternalTensor

FloatArray: TypeAlias = npt.NDArray[np.float32]
Tensors: TypeAlias = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class KindBlueprint:
    """One kind of expert: the graph with weights as inputs, its twin with external ones, layout."""

    graph: bytes
    graph_external: bytes
    layout: ShardLayout


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A package without its weights. `graphs` maps package paths to serialized models."""

    kinds: Mapping[str, KindBlueprint]
    layers: tuple[Layer, ...]
    graphs: Mapping[str, bytes]
    plan: Plan
    active_parameters: int


@dataclass(frozen=True, slots=True)
class FamilyExporter:
    """How one model family becomes a package.

    `resident_names` lists the tensors kept in memory; `expert_names(layer, expert)` maps a
    shard's tensor names to the model's; `build(config, resident index, dtype)` makes the
    graphs; `sample_inputs(config, seed)` draws the inputs of a parity case.
    """

    name: Family
    resident_names: Callable[[Mapping[str, Any]], list[str]]
    expert_names: Callable[[int, int], dict[str, str]]
    build: Callable[[Mapping[str, Any], Mapping[str, ExternalTensor], DType], Blueprint]
    sample_inputs: Callable[[Mapping[str, Any], int], dict[str, npt.NDArray[Any]]]
