"""The sizes a forecast needs of a model: from a manifest here, elsewhere from a config. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from evermind_manifests.dtypes import tensor_bytes
from evermind_manifests.manifest import Manifest, StateSpec
from msgspec import structs

from .layers import ExpertLayer, all_bytes, cycle_bytes, expert_layers, step_bytes
from .rows import most_rows

DEFAULT_CONTEXT: Final = 4096


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes as held in memory, counts of parameters.

    `active_resident_bytes` are those of the resident weights that one token reads;
    `active_parameters` count its experts too. `state_bytes` are one sequence's.
    `expert_parameters` are the routed experts' all together. `graph_runs` is how many graphs
    one decoded token runs. `pooled_from` is what the experts take as they are stored where
    opening puts them all into float32 pools, else 0.
    """

    layers: tuple[ExpertLayer, ...]
    resident_bytes: int
    active_resident_bytes: int
    state_bytes: int
    total_parameters: int
    active_parameters: int
    expert_parameters: int
    graph_runs: int
    pooled_from: int = 0

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
            "all_expert_bytes": self.all_expert_bytes,
            "cycle_bytes": self.cycle_bytes,
            "uses": self.uses,
            "least_budget": self.least_budget,
            "active_bytes": self.active_bytes,
        }


def manifest_sizes(manifest: Manifest, *, context: int = DEFAULT_CONTEXT) -> ModelSizes:
    """What a package's manifest says, and nothing else is read.

    A state that grows is counted for sequences of `context` tokens, or its limit if less.
    The resident part is taken to hold its parameters in one width, so the share of it that a
    token reads is that of the parameters.
    """
    resident = manifest.files[manifest.resident].bytes if manifest.resident else 0
    each = _expert_parameters(manifest)
    experts = sum(layer.experts * each[layer.kind] for layer in manifest.layers)
    routed = sum(layer.top_k * each[layer.kind] for layer in manifest.layers)
    trunk = max(1, manifest.parameters.total - experts)
    active_trunk = max(0, manifest.parameters.active - routed)
    return ModelSizes(
        layers=expert_layers(manifest),
        resident_bytes=resident,
        active_resident_bytes=min(resident, round(resident * active_trunk / trunk)),
        state_bytes=states_bytes(manifest.plan.state.values(), context),
        total_parameters=manifest.parameters.total,
        active_parameters=manifest.parameters.active,
        expert_parameters=experts,
        graph_runs=len(manifest.plan.decode),
    )


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


def states_bytes(states: Iterable[StateSpec], context: int) -> int:
    """What they take for a sequence of `context` tokens."""
    return sum(_state_bytes(spec, context) for spec in states)


def _state_bytes(spec: StateSpec, context: int) -> int:
    one = tensor_bytes(spec.dtype, spec.fixed)
    if not spec.grows:
        return one
    return one * min(context, most_rows(spec))
