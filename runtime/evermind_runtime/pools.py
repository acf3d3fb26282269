"""Every expert of a package in float32, side by side: what pooled programs run over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from evermind_manifests import dtypes
from evermind_manifests.manifest import Layer, Manifest, Pool, TensorSpec

from .devices import CpuSlot, host_value
from .host_memory import HostMemory
from .pager import Pager

if TYPE_CHECKING:
    import onnxruntime as ort


def pool_bytes(manifest: Manifest) -> int:
    """What the pools of a package's pooled programs take in memory; 0 if it has none."""
    return sum(map(_bytes, _shapes(manifest).values()))


class Pools:
    """Owns the stacked experts for the life of the model; nothing is ever evicted."""

    def __init__(self, manifest: Manifest, pager: Pager) -> None:
        """Read all experts through `pager`, one at a time. Raises what `Pager.stream` does."""
        shapes = _shapes(manifest)
        memory = HostMemory(sum(map(_bytes, shapes.values())))
        self._arrays: dict[tuple[int, str], npt.NDArray[np.float32]] = {
            key: memory.take(_bytes(shape)).view(np.float32).reshape(shape)
            for key, shape in shapes.items()
        }
        self.bytes = sum(array.nbytes for array in self._arrays.values())
        for layer in manifest.layers:
            specs = [
                spec
                for spec in manifest.kinds[layer.kind].tensors
                if (layer.layer, spec.name) in self._arrays
            ]
            if specs:
                self._fill(pager, layer, specs)
        self._values = {key: host_value(array, "f32") for key, array in self._arrays.items()}

    def value(self, pool: Pool) -> ort.OrtValue:
        """The pool `(experts, *shape)` as an OrtValue over its own memory."""
        return self._values[pool.layer, pool.tensor]

    def _fill(self, pager: Pager, layer: Layer, specs: Sequence[TensorSpec]) -> None:
        with closing(pager.stream(layer.layer, range(layer.experts))) as slots:
            for expert, slot in enumerate(slots):
                assert isinstance(slot, CpuSlot), "pooled programs run on the cpu"
                for spec in specs:
                    stored = slot.buffer[spec.offset : spec.offset + spec.bytes]
                    self._arrays[layer.layer, spec.name][expert] = dtypes.decode(
                        stored, spec.dtype, spec.shape
                    )


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def _shapes(manifest: Manifest) -> Mapping[tuple[int, str], tuple[int, ...]]:
    layers = {layer.layer: layer for layer in manifest.layers}
    shapes = {}
    for pool in _pools(manifest):
        layer = layers[pool.layer]
        specs = {spec.name: spec for spec in manifest.kinds[layer.kind].tensors}
        shapes[pool.layer, pool.tensor] = (layer.experts, *specs[pool.tensor].shape)
    return shapes


def _pools(manifest: Manifest) -> Iterator[Pool]:
    pooled = manifest.plan.pooled
    if pooled is not None:
        for step in (*pooled.prefill, *pooled.decode):
            yield from step.pools.values()
