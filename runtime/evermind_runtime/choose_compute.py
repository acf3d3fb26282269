"""Which dtype to compute in: float32, or the half precision that a package has programs for.

Pure: a name, a manifest and a device in, a choice out.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from evermind_manifests.errors import DeviceError, InputError, UnsupportedError
from evermind_manifests.manifest import Half, Manifest

ComputeName: TypeAlias = Literal["auto", "f32", "f16", "bf16"]


def choose_compute(asked: ComputeName, manifest: Manifest, device: str) -> Literal["f32"] | Half:
    """What to compute in on `device`: "auto" takes half precision on a GPU, where there is one.

    Raises `UnsupportedError` if the package has no such programs, `DeviceError` if the device
    cannot run them, `InputError` for a name that is none.
    """
    if asked not in get_args(ComputeName):
        raise InputError(
            f"compute: expected one of {', '.join(get_args(ComputeName))}, found {asked!r}"
        )
    if asked == "f32":
        return asked
    if asked == "auto":
        # Of two, bfloat16 is there because the weights are: what was trained may need its range.
        best: tuple[Half, ...] = ("bf16", "f16") if device != "cpu" else ()
        return next((one for one in best if one in manifest.variants), "f32")
    if asked not in manifest.variants:
        has = ", ".join(["f32", *manifest.variants])
        raise UnsupportedError(
            f"compute: {asked!r} was asked for, but {manifest.name} has programs for {has} only",
            hint="Import it again with --compute both, or leave compute to 'auto'.",
        )
    if device == "cpu" and asked == "bf16":
        raise DeviceError(
            "compute: 'bf16' was asked for, but ONNX Runtime's CPU provider has no kernels for it",
            hint="Use compute='f32' here, or device='cuda'.",
        )
    return asked
