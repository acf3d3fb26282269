"""What a family's `build` hands over: a package without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from evermind_manifests.manifest import Layer, Plan
from evermind_manifests.shard import ShardLayout

FloatArray: TypeAlias = npt.NDArray[np.float32]
Tensors: TypeAlias = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class KindBlueprint:
    """One kind of expert: the graphs and the layout that its `Kind` in the manifest names.

    `scope` "sequence" is for an expert that must see every token of the sequence.
    """

    graph: bytes
    graph_external: bytes
    layout: ShardLayout
    scope: Literal["token", "sequence"] = "token"
    graph_statistics: bytes | None = None


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A package without its weights. `graphs` maps package paths to serialized models."""

    kinds: Mapping[str, KindBlueprint]
    layers: tuple[Layer, ...]
    graphs: Mapping[str, bytes]
    plan: Plan
    active_parameters: int
