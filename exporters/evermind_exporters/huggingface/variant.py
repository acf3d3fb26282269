"""The model once more in half precision: transformers' own graph of it, cut like the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evermind_manifests.dtypes import tensor_bytes
from evermind_manifests.errors import ConfigError, UnsupportedError
from evermind_manifests.manifest import MOST_TOLERANCE, DType, Half

from .cut import cut_graph
from .expert_kinds import ExpertKinds, HalfExperts
from .experts import ExpertsModule
from .skeleton import skeleton
from .trace import empty_model, trace
from .trunk import Trunk

#: A variant may be so many times as far from float32 as transformers is in the same dtype, and
#: in any case a few units of its last place, which are next to nothing in a tiny model.
_TIMES, _UNITS = 3.0, 8.0
_EPSILON: dict[Half, float] = {"f16": 2.0**-11, "bf16": 2.0**-8}


class HalfModel:
    """The model in `compute`: its graph, cut, and its experts' graphs."""

    def __init__(
        self,
        folder: Path,
        compute: Half,
        modules: list[ExpertsModule],
        kinds: ExpertKinds,
        trunk: Trunk,
        limit: int | None,
    ) -> None:
        """Trace it. Raises `UnsupportedError` where transformers cannot."""
        empty = empty_model(folder, compute)
        self.compute: Half = compute
        self.experts = HalfExperts(kinds, empty, modules, compute)
        #: transformers' own, whose weights are lent to it.
        self.model: Any = skeleton(empty, modules, trunk.name)
        self.cut = cut_graph(trace(self.model, modules, trunk.names, cuda=True), trunk, limit)


def half_of(
    stored_as: Sequence[Mapping[str, DType]], modules: Sequence[ExpertsModule], trunk: Trunk
) -> Half:
    """The half precision that most bytes of weights are stored in: it needs no cast of them.

    Raises `ConfigError` where none is.
    """
    sizes: Counter[DType] = Counter()
    for types, module in zip(stored_as, modules, strict=True):
        for name, shape in module.tensors.items():
            sizes[types[name]] += module.experts * tensor_bytes(types[name], shape)
    for one in trunk.weights.values():
        sizes[one.dtype] += tensor_bytes(one.dtype, one.shape)
    compute: Half = "bf16" if sizes["bf16"] >= sizes["f16"] else "f16"
    if not sizes[compute]:
        raise ConfigError(
            "compute: expected weights in half precision to compute with, found "
            f"{', '.join(sorted(sizes))}",
            hint="Import with --dtype f16 or --dtype bf16 too.",
        )
    return compute


def tolerance(compute: Half, error: float) -> float:
    """How far a variant may be off where transformers is by `error` in the same dtype.

    Raises `UnsupportedError` where that is more than a manifest may say.
    """
    allowed = max(_TIMES * error, _UNITS * _EPSILON[compute])
    if not allowed <= MOST_TOLERANCE:
        other = "--dtype bf16, whose range is float32's, or with " if compute == "f16" else ""
        raise UnsupportedError(
            f"compute: transformers itself is off by {error:.2g} of the largest logit in "
            f"{compute}: expected at most {MOST_TOLERANCE / _TIMES:.2g}",
            hint=f"Import with {other}--compute f32.",
        )
    return allowed
