"""How many threads should compute? Sharing out small products costs more than it gains. Pure."""

from __future__ import annotations

import math
from typing import Final

from evermind_manifests.errors import DeviceError
from evermind_manifests.manifest import Kind, Manifest

# One thread decodes faster where no matrix of an expert has more elements than this. Two that
# share a cache gave 0.65 to 0.97 of its speed up to 256 x 256, and 1.2 at 256 x 512; two that do
# not gave 0.3 to 0.4. From 512 x 512 on two gave 1.5 at best (BENCHMARKS.md, "Scaling").
SMALL_MATRIX: Final = 128 * 1024
# Unless experts are the smaller part of a token by more than this: the rest may be one large head.
_MOST_BESIDE = 2
# More threads than cores only ever wait for one another; a few times as many do not harm.
_MOST_PER_CORE = 4


def check_threads(threads: int | None, cores: int) -> None:
    """Raise `DeviceError` for a number of threads that these cores are not asked for."""
    if threads is not None and not 1 <= threads <= _MOST_PER_CORE * cores:
        raise DeviceError(
            f"threads: expected 1 to {_MOST_PER_CORE * cores} on these {cores} cores, "
            f"found {threads}"
        )


def suited_threads(manifest: Manifest, cores: int) -> int:
    """The threads that decode a token soonest, of `cores` that may be used."""
    largest = max(map(_largest_matrix, manifest.kinds.values()), default=0)
    if largest > SMALL_MATRIX:
        return cores
    # What the manifest declares, and nobody has counted.
    active = manifest.parameters.active
    if 0 < active <= SMALL_MATRIX:
        return 1  # nothing of it is a larger matrix
    if not largest:
        return cores
    experts = sum(
        layer.top_k * sum(math.prod(spec.shape) for spec in manifest.kinds[layer.kind].tensors)
        for layer in manifest.layers
    )
    beside = active - experts
    return 1 if beside <= _MOST_BESIDE * experts else cores


def _largest_matrix(kind: Kind) -> int:
    """Elements of the largest, whether it stands alone or in a stack."""
    matrices = (spec.shape for spec in kind.tensors if len(spec.shape) > 1)
    return max((math.prod(shape[-2:]) for shape in matrices), default=0)
