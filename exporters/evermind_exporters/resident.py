"""graphs/resident.safetensors: what is always in memory, stored once.

Written by the `safetensors` library; graphs point into it by offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from evermind_manifests.manifest import RESIDENT_NAME
from safetensors.numpy import save

from .onnx_graph import ExternalTensor

_LOCATION = RESIDENT_NAME.rpartition("/")[2]


def pack_resident(
    tensors: Mapping[str, npt.NDArray[np.float32]],
) -> tuple[bytes, dict[str, ExternalTensor]]:
    """The file's bytes, and where each tensor lies in them.

    All tensors are float32; offsets count from the file's first byte, as ONNX wants them.
    """
    data = save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    index = {}
    for name in tensors:
        begin, end = header[name]["data_offsets"]
        shape = tuple(header[name]["shape"])
        index[name] = ExternalTensor(_LOCATION, "f32", shape, 8 + header_bytes + begin, end - begin)
    return data, index
