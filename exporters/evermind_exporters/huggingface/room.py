"""What a package will take on the disk, found out before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from evermind_manifests.dtypes import tensor_bytes
from evermind_manifests.errors import ExportError
from evermind_manifests.source_map import KEPT_NAME

from ..resident import Stored
from .expert_kinds import ExpertKinds
from .experts import ExpertsModule

# A layer's graphs, and an expert's lines in the manifest and in source.json, are at most so large.
_LAYER_BYTES: Final = 64 << 10
_EXPERT_BYTES: Final = 2 << 10
# What a file system gives a file is a multiple of it.
_BLOCK: Final = 4096
#: Of one logit in parity.json: a float32 in base64.
LOGIT_BYTES: Final = 16 / 3


def package_parts(
    kinds: ExpertKinds,
    modules: Sequence[ExpertsModule],
    trunk: Mapping[str, Stored],
    kept: Mapping[str, Stored],
    logits: int,
) -> dict[str, int]:
    """What the parts of a package take, by what they are called in a message.

    `logits` is how many the parity case has.
    """
    layouts = [kinds.blueprints[kind].layout for kind in kinds.of]
    layers = list(zip(modules, layouts, strict=True))
    count = sum(module.experts for module in modules)
    small = len(layers) * _LAYER_BYTES + count * _EXPERT_BYTES + round(logits * LOGIT_BYTES)
    return {
        "experts": sum(one.experts * _on_disk(layout.bytes) for one, layout in layers),
        "all other weights": _size(trunk),
        f"what {KEPT_NAME} keeps for the way back": _size(kept),
        "graphs, manifest and parity case": small,
    }


def check_room(destination: Path, parts: Mapping[str, int], written: int) -> None:
    """Raise `ExportError` where the disk has not as much free as is missing.

    `written` is how much of it an import before has left there.
    """
    needed = sum(parts.values())
    if destination.suffix == ".zip":
        needed *= 2  # the files, and then one file of them all
    missing = max(0, needed - written)
    free = shutil.disk_usage(destination.parent).free
    if missing <= free:
        return
    listed = ", ".join(f"{size:,} for {name}" for name, size in parts.items() if size)
    twice = ", twice, as a .zip is made of files" if destination.suffix == ".zip" else ""
    raise ExportError(
        f"{destination}: the disk is too full: {missing:,} bytes are needed, {free:,} are free",
        hint=f"It takes {listed}{twice}. Free some space, or choose another disk.",
    )


def _size(tensors: Mapping[str, Stored]) -> int:
    return sum(tensor_bytes(one.dtype, one.shape) for one in tensors.values())


def _on_disk(size: int) -> int:
    return size + -size % _BLOCK
