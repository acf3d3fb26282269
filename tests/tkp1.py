"""A writer of `TKP1` checkpoints for tests, from the format's description alone."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def write_tkp1(
    tensors: Mapping[str, npt.NDArray[np.float32]],
    *,
    step: int = 3,
    configuration: str = "{}",
    gradients: bool = False,
) -> bytes:
    """The file's bytes; moments are made up, every other parameter has a gradient if asked."""
    text = configuration.encode()
    parts = [b"TKP1", struct.pack("<4I", 1, step, len(tensors), len(text)), text]
    for number, (name, array) in enumerate(tensors.items()):
        values = array.astype("<f4").tobytes()
        count = struct.pack("<I", array.size)
        parts += [struct.pack("<I", len(name.encode())), name.encode()]
        parts += [count, values, count, bytes(len(values)), count, values]
        has_gradient = gradients and number % 2 == 0
        parts.append(struct.pack("<IB", step, has_gradient))
        if has_gradient:
            parts += [count, values]
    return b"".join(parts)
