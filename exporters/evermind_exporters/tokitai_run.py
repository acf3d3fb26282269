"""A trained Tokitai run: `checkpoint.tkp1` beside its `arch.json`.

A checkpoint has no shapes; every matrix lies beside a bias, whose length tells them. arch.json
must not contradict that. Which keys it has is not published (specs/tokitai.md, section 5), so
several spellings are understood, at any depth: what stands higher up counts. The rest is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from evermind_manifests.errors import CheckpointError

from .blueprint import Tensors
from .checkpoints.tkp1 import Tkp1File
from .family import Shape
from .lazy_tensors import LazyTensors

ARCH_NAME: Final = "arch.json"
CHECKPOINT_NAME: Final = "checkpoint.tkp1"

_SPELLINGS: Final[dict[str, tuple[str, ...]]] = {
    "size": ("size", "size_variant", "variant", "model_size"),
    "in_dim": ("in_dim", "input_dim", "in_features", "d_in"),
    "out_dim": ("out_dim", "output_dim", "out_features", "d_out"),
    "hidden": ("hidden", "hidden_dim", "hidden_size", "h"),
    "depth": ("depth", "num_layers", "n_layers", "layers", "n"),
    "n_experts": ("n_experts", "num_experts", "expert_count", "experts"),
    "top_k": ("top_k", "topk", "k", "num_experts_per_tok", "experts_per_token"),
    "renormalize": ("renormalize", "renormalise", "norm_topk_prob"),
    "gelu": ("gelu",),
    "layer_norm_eps": ("layer_norm_eps", "layernorm_eps", "layer_norm_epsilon"),
    "seed": ("seed",),
    "router_kind": ("router_kind", "router", "router_kernel"),
    "fingerprint": ("fingerprint", "sha256", "topology_sha256"),
}
# Too common to mean the same inside of something else.
_TOP_ONLY: Final = frozenset({"size", "variant", "h", "n", "k", "kind", "sha256"})
# May also hold the things themselves.
_CONTAINERS: Final = ("size", "variant", "layers", "experts", "router")
_FAMILY: Final = ("family", "model_family", "kind")
_MOE: Final = ("moe", "tokitai-moe", "tokitai", "mixture_of_experts")


class TokitaiRun(NamedTuple):
    """What a run says: a raw configuration, updates made, shapes, and its weights in them."""

    raw: dict[str, Any]
    step: int
    shapes: dict[str, Shape]
    tensors: Tensors


def read_tokitai_run(checkpoint: Path, arch: Mapping[str, Any]) -> TokitaiRun:
    """The run whose architecture file holds `arch`.

    Raises `CheckpointError` for a damaged checkpoint, one whose parameters are no model's, or
    an architecture that is not a mixture of experts.
    """
    file = Tkp1File(checkpoint)
    shapes = _shapes(file.counts, file.location)
    tensors = LazyTensors(shapes, lambda name, shape: file[name].reshape(shape))
    raw = _raw(arch, str(checkpoint.with_name(ARCH_NAME)))
    return TokitaiRun(raw, file.step, shapes, tensors)


def _raw(arch: Mapping[str, Any], where: str) -> dict[str, Any]:
    flat = _flat(arch)
    family = next((flat[key] for key in _FAMILY if key in flat), "moe")
    if not isinstance(family, str) or family.lower() not in _MOE:
        raise CheckpointError(f"{where}: family: expected a mixture of experts, found {family!r}")
    raw: dict[str, Any] = {"module": "moe"}
    for name, spellings in _SPELLINGS.items():
        found = next((key for key in flat if key in spellings), None)
        if found is not None:
            raw[name] = flat[found]
    return raw


def _flat(arch: Mapping[str, Any]) -> dict[str, Any]:
    """What is said anywhere in `arch`, by key in lower case; null says nothing."""
    flat: dict[str, Any] = {}
    levels: list[Mapping[str, Any]] = [arch]
    for level in levels:  # grows: breadth first, so what is higher up comes first
        for name, value in level.items():
            key = name.lower()
            if isinstance(value, Mapping):
                levels.append(value)
            holds = key in _CONTAINERS and isinstance(value, Mapping | list)
            if value is None or holds or (level is not arch and key in _TOP_ONLY):
                continue
            flat.setdefault(key, value)
    return flat


def _shapes(counts: Mapping[str, int], where: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, count in counts.items():
        rows = counts.get(name.removesuffix(".weight") + ".bias", 0)
        if not name.endswith(".weight") or ".norms." in name or not rows:
            shapes[name] = (count,)
        elif count % rows:
            raise CheckpointError(
                f"{where}: {name}: expected a multiple of its bias's {rows:,} elements, "
                f"found {count:,}"
            )
        else:
            shapes[name] = (rows, count // rows)
    return shapes
