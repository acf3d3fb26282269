"""From a package back to the peer's files: `MoE0`, `EVL0`, `LMBC`, `.evermind`, exports.

float32 in gives float32 out byte for byte, and half gives half: resident weights lie in a
package as float32, which holds a half exactly, and experts as they are.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from evermind_manifests import dtypes
from evermind_manifests.destination import replacing
from evermind_manifests.dtypes import Rounding
from evermind_manifests.errors import ConfigError, ExportError
from evermind_manifests.manifest import CARD_NAME, Card, Manifest
from evermind_manifests.package import Package
from evermind_manifests.safetensors_header import read_header

from .checkpoints import (
    FAMILIES,
    Checkpoint,
    Family,
    PeerManifest,
    canonical_shapes,
    new_peer_manifest,
    validate_config,
    write_evermind,
    write_evl0,
    write_lmbc,
    write_moe0,
    write_peer_gguf,
    write_peer_safetensors,
)
from .checkpoints.checkpoint import in_order
from .families import FAMILIES as EXPORTERS
from .peer_attachments import read_attachments
from .peer_bundle import bundle_files
from .peer_tokenizer import TOKENIZER_NAME
from .source import WEIGHTS_NAME

Target: TypeAlias = Literal["moe0", "evl0", "lmbc", "evermind", "safetensors", "gguf"]
TARGETS: Final[tuple[Target, ...]] = get_args(Target)

_HOLDS: Final[dict[Target, tuple[Family, ...]]] = {
    "moe0": ("shared-expert-moe",),
    "evl0": ("evermind-lm",),
    "lmbc": ("limbic",),
    "evermind": ("shared-expert-moe", "evermind-lm"),
    "safetensors": ("evermind-lm",),
    "gguf": ("evermind-lm",),
}


def convert_package(
    package: Package,
    target: Target,
    *,
    half: bool | None = None,
    rounding: Rounding = "nearest",
    trailer: bool = True,
) -> bytes:
    """The bytes of the peer's file that holds this package's model.

    `half` chooses the precision; by default it is the package's own: half if its experts are
    stored as f16, else float32 (also for a model without experts). `rounding` is used where
    float32 becomes half, resident weights of an f16 package too; `"truncate"` is what the peer
    does. `trailer=False` leaves out the CRC of `EVL0`, as the peer's versions before 2026.6.34
    did. Raises `ConfigError` if `target` cannot hold the model, `ExportError` if a weight does
    not fit a half, and `IntegrityError` for a damaged package.
    """
    family = _family(package)
    if family not in _HOLDS[target]:
        raise ConfigError(
            f"{package.location}: a {family!r} model cannot be written as {target}",
            hint=f"It fits: {', '.join(t for t in TARGETS if family in _HOLDS[t])}.",
        )
    checkpoint = package_checkpoint(package)
    if half is None:
        half = checkpoint.half
    if target == "moe0":
        return write_moe0(checkpoint, half, rounding)
    if target == "lmbc":
        return write_lmbc(checkpoint, half, rounding)
    if target == "evl0":
        return write_evl0(checkpoint, half, rounding, trailer=trailer)
    if target == "safetensors":
        return write_peer_safetensors(checkpoint, half, rounding)
    if target == "gguf":
        return write_peer_gguf(checkpoint, half, rounding, package.manifest.name)
    manifest, codec = _peer_manifest(package)
    return write_evermind(
        checkpoint, manifest, half=half, rounding=rounding, codec=codec, trailer=trailer
    )


def convert_to_bundle(
    package: Package, *, half: bool | None = None, rounding: Rounding = "nearest"
) -> dict[str, bytes]:
    """The files of a Hugging Face bundle like the peer's, by name; options as above.

    The tokenizer is the package's own file, which gives the peer's ids where the peer's
    export does not. ONNX and GGUF are left out.
    """
    weights = convert_package(package, "safetensors", half=half, rounding=rounding)
    files = {WEIGHTS_NAME: weights, **bundle_files(package.manifest.config)}
    tokenizer = package.manifest.tokenizer
    if tokenizer is not None and tokenizer.file is not None:
        files[TOKENIZER_NAME] = package.read_file(tokenizer.file)
    if CARD_NAME in package.manifest.files:
        files[CARD_NAME] = package.read_file(CARD_NAME)
    return files


def package_checkpoint(package: Package) -> Checkpoint:
    """The model in a package, its tensors as float32; `half` if its experts are stored as f16.

    Raises `ConfigError` for a family the peer does not have, `IntegrityError` or `ShardError`
    for a damaged package.
    """
    manifest = package.manifest
    family = _family(package)
    config = validate_config(family, manifest.config)
    tensors = _resident(package)
    for layer in manifest.layers:
        for expert in range(layer.experts):
            contents = package.read_shard(layer.layer, expert)
            names = EXPORTERS[family].expert_names(config, layer.layer, expert)
            for tensor, name in names.items():
                tensors[name] = contents.array(tensor)
    ordered = in_order(tensors, canonical_shapes(family, config), package.location)
    return Checkpoint(family, config, ordered, _stored_half(manifest))


def write_file(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write a file whole or not at all: see `replacing`.

    Raises `ExportError` if it exists and may not be replaced, or cannot be written.
    """
    if not overwrite:
        _refuse_existing(path)
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from error


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder of files, whole or not at all. Raises `ExportError` if it exists."""
    _refuse_existing(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir()
        for name, data in files.items():
            with replacing(temporary / name) as file:
                file.write(data)
        temporary.rename(path)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _family(package: Package) -> Family:
    family = package.manifest.family
    if family not in FAMILIES:
        raise ConfigError(
            f"{package.location}: family: expected one of {', '.join(FAMILIES)}, found {family!r}"
        )
    return family


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ExportError(f"{path}: exists already", hint="Choose another name, or remove it.")


def _peer_manifest(package: Package) -> tuple[PeerManifest, bytes]:
    """The manifest this package came with, brought up to date, or a new one."""
    manifest = package.manifest
    kept, codec = read_attachments(package)
    card = manifest.card or Card()
    if kept is None:
        fresh = new_peer_manifest(
            _family(package),
            manifest.config,
            name=manifest.name,
            version=manifest.version,
            card=card,
            created=manifest.created,
        )
        return fresh, b""
    changes = {}
    # A package's name or version may stand in for one the peer's file did not have.
    if kept.name is not None:
        changes["name"] = manifest.name
    if kept.version is not None:
        changes["version"] = manifest.version
    if manifest.created is not None:
        changes["createdAt"] = manifest.created
    return kept.update(changes).with_card(card), codec


def _resident(package: Package) -> dict[str, npt.NDArray[np.float32]]:
    path = package.manifest.resident
    if path is None:
        return {}
    data = package.read_file(path)
    return {
        name: dtypes.decode(memoryview(data)[spec.begin : spec.end], spec.dtype, spec.shape)
        for name, spec in read_header(data, where=path).items()
    }


def _stored_half(manifest: Manifest) -> bool:
    dtypes_used = {spec.dtype for kind in manifest.kinds.values() for spec in kind.tensors}
    return dtypes_used == {"f16"}
