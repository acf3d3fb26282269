"""The sizes a forecast needs of a model: from a manifest here, elsewhere from a config. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from evermind_manifests.dtypes import tensor_bytes
from evermind_manifests.manifest import ExpertsStep, Manifest, StateSpec
from msgspec import structs

from .layers import ExpertLayer, all_bytes, cycle_bytes, expert_layers, slot_bytes, step_bytes
from .rows import window_rows

DEFAULT_CONTEXT: Final = 4096


# Where nothing bounds a context, more than any memory holds.
_ANY_CONTEXT = 1 << 48


@dataclass(frozen=True, slots=True)
class StateSizes:
    """What one sequence keeps: `fixed` bytes, `per_token` for each of its tokens, and for
    `windows` (bytes of a row, rows held at most) as many rows as it has tokens, up to that.

    `longest` is how many tokens it can have at most, `None` if nothing says so.
    """

    fixed: int = 0
    per_token: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    longest: int | None = None

    def bytes(self, tokens: int) -> int:
        """What a sequence of so many tokens, or of the longest, takes."""
        if self.longest is not None:
            tokens = min(tokens, self.longest)
        windows = sum(row * min(tokens, rows) for row, rows in self.windows)
        return self.fixed + self.per_token * tokens + windows

    @property
    def bounded(self) -> int:
        """What windows take at most."""
        return sum(row * rows for row, rows in self.windows)

    def tokens(self, room: int) -> int | None:
        """The longest sequence that `room` bytes hold; `None` where that is as long as you like."""
        most = _ANY_CONTEXT if self.longest is None else self.longest
        found = bisect_right(range(most + 1), room, key=self.bytes) - 1
        return None if found == _ANY_CONTEXT else max(0, found)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes as held in memory, counts of parameters.

    `active_resident_bytes` are those of the resident weights that one token reads;
    `active_parameters` count its experts too. `state` is one sequence's, of `context` tokens.
    `expert_parameters` are the routed experts' all together. `graph_runs` is how many graphs
    the decode program runs. `pooled_from` is what the experts take as they are stored where
    opening puts them all into float32 pools, else 0. `more_runs` is how many graphs more a
    token runs where each of its experts decodes in a run of its own.
    """

    layers: tuple[ExpertLayer, ...]
    resident_bytes: int
    active_resident_bytes: int
    state: StateSizes
    total_parameters: int
    active_parameters: int
    expert_parameters: int
    graph_runs: int
    context: int = DEFAULT_CONTEXT
    pooled_from: int = 0
    more_runs: int = 0

    @property
    def state_bytes(self) -> int:
        """What a sequence keeps."""
        return self.state.bytes(self.context)

    @property
    def all_expert_bytes(self) -> int:
        """What all experts take."""
        return all_bytes(self.layers)

    @property
    def cycle_bytes(self) -> int:
        """The experts of one token, over all layers."""
        return cycle_bytes(self.layers)

    @property
    def least_budget(self) -> int:
        """The experts of one token in one layer."""
        return step_bytes(self.layers)

    @property
    def uses(self) -> int:
        """How many experts one token passes through."""
        return sum(layer.top_k for layer in self.layers)

    @property
    def active_bytes(self) -> int:
        """The weights that one token reads from memory."""
        return self.active_resident_bytes + self.cycle_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; layers that are alike stand together."""
        groups: dict[tuple[int, int, int], int] = {}
        for layer in self.layers:
            key = (layer.experts, layer.top_k, layer.bytes)
            groups[key] = groups.get(key, 0) + 1
        return asdict(self) | {
            "layers": [
                {"layers": count, "experts": experts, "top_k": top_k, "bytes": size}
                for (experts, top_k, size), count in groups.items()
            ],
            "state_bytes": self.state_bytes,
            "all_expert_bytes": self.all_expert_bytes,
            "cycle_bytes": self.cycle_bytes,
            "uses": self.uses,
            "least_budget": self.least_budget,
            "active_bytes": self.active_bytes,
        }


def manifest_sizes(manifest: Manifest, *, context: int = DEFAULT_CONTEXT) -> ModelSizes:
    """What a package's manifest says, and nothing else is read.

    A sequence is taken to have `context` tokens, or as many as it can if these are fewer.
    The resident part is taken to hold its parameters in one width, so the share of it that a
    token reads is that of the parameters.
    """
    resident = manifest.files[manifest.resident].bytes if manifest.resident else 0
    each = _expert_parameters(manifest)
    experts = sum(layer.experts * each[layer.kind] for layer in manifest.layers)
    routed = sum(layer.top_k * each[layer.kind] for layer in manifest.layers)
    trunk = max(1, manifest.parameters.total - experts)
    active_trunk = max(0, manifest.parameters.active - routed)
    state = state_sizes(manifest.plan.state.values())
    return ModelSizes(
        layers=expert_layers(manifest),
        resident_bytes=resident,
        active_resident_bytes=min(resident, round(resident * active_trunk / trunk)),
        state=state,
        total_parameters=manifest.parameters.total,
        active_parameters=manifest.parameters.active,
        expert_parameters=experts,
        graph_runs=len(manifest.plan.decode),
        context=context if state.longest is None else min(context, state.longest),
        more_runs=_more_runs(manifest),
    )


def _more_runs(manifest: Manifest) -> int:
    from .open_engine import decodes_one_by_one
    from .program import has_bf16

    bf16 = any(has_bf16(manifest.kinds[layer.kind]) for layer in manifest.layers)
    if not manifest.layers or not decodes_one_by_one(slot_bytes(manifest), bf16=bf16):
        return 0
    top_k = {layer.layer: layer.top_k for layer in manifest.layers}
    runs = [
        top_k[step.layer] if isinstance(step, ExpertsStep) else 1 for step in manifest.plan.prefill
    ]
    return sum(runs) - len(manifest.plan.decode)


def state_sizes(states: Iterable[StateSpec]) -> StateSizes:
    """What a plan's states take."""
    fixed = per_token = 0
    windows: Counter[int] = Counter()
    limits = []
    for spec in states:
        one = tensor_bytes(spec.dtype, spec.fixed)
        if spec.window:
            windows[window_rows(spec.window)] += one
        elif spec.grows:
            per_token += one
        else:
            fixed += one
        if spec.limit:
            limits.append(spec.limit)
    rows = tuple((size, most) for most, size in sorted(windows.items()))
    return StateSizes(fixed, per_token, rows, min(limits, default=None))


def pooled_sizes(manifest: Manifest, sizes: ModelSizes) -> ModelSizes:
    """The same package under the plan `resident`, whose experts stand in float32 pools."""
    pooled = manifest.plan.pooled
    assert pooled is not None, "the plan was chosen, so the package has it"
    each = _expert_parameters(manifest)
    layers = zip(sizes.layers, manifest.layers, strict=True)
    return replace(
        sizes,
        layers=tuple(structs.replace(one, bytes=4 * each[layer.kind]) for one, layer in layers),
        graph_runs=len(pooled.decode),
        pooled_from=sizes.all_expert_bytes,
        more_runs=0,
    )


def generates(manifest: Manifest) -> bool:
    """Whether the package continues tokens, as `Model.generate` does."""
    return "tokens" in manifest.plan.inputs and "logits" in manifest.plan.outputs


def _expert_parameters(manifest: Manifest) -> dict[str, int]:
    """What one expert of each kind has."""
    return {
        name: sum(math.prod(spec.shape) for spec in kind.tensors)
        for name, kind in manifest.kinds.items()
    }
