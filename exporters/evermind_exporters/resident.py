"""graphs/resident.safetensors: what is always in memory, stored once.

Written by the `safetensors` library; graphs point into it by offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from evermind_manifests.manifest import RESIDENT_NAME
from evermind_manifests.safetensors_header import read_header
from safetensors.numpy import save

from .onnx_graph import ExternalTensor

_LOCATION = RESIDENT_NAME.rpartition("/")[2]


def pack_resident(
    tensors: Mapping[str, npt.NDArray[Any]],
) -> tuple[bytes, dict[str, ExternalTensor]]:
    """The file's bytes, and where each tensor lies in them.

    Offsets count from the file's first byte, as ONNX wants them.
    """
    data = save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    header = read_header(data, where=RESIDENT_NAME)
    index = {}
    for name in tensors:
        spec = header[name]
        length = spec.end - spec.begin
        index[name] = ExternalTensor(_LOCATION, spec.dtype, spec.shape, spec.begin, length)
    return data, index
