"""What a package keeps of the `.evermind` file it came from, so that the way back is exact.

`peer/manifest.json` is the file's manifest to the letter, with all keys we have no place for;
`peer/codec.safetensors` holds a media model's codec section as one tensor of bytes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from evermind_manifests.errors import CheckpointError
from evermind_manifests.package import Package
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .checkpoints import PeerManifest, parse_peer_manifest

MANIFEST_PATH: Final = "peer/manifest.json"
CODEC_PATH: Final = "peer/codec.safetensors"
_CODEC = "codec"


def attachments(manifest: PeerManifest, codec: bytes) -> dict[str, bytes]:
    """The package files that keep `manifest` and `codec`."""
    files = {MANIFEST_PATH: manifest.text.encode()}
    if codec:
        files[CODEC_PATH] = save({_CODEC: np.frombuffer(codec, np.uint8)})
    return files


def read_attachments(package: Package) -> tuple[PeerManifest | None, bytes]:
    """The kept manifest (`None` if the package never was an `.evermind` file) and codec.

    Raises `CheckpointError` for attachments that are not what `attachments` wrote.
    """
    files = package.manifest.files
    if MANIFEST_PATH not in files:
        return None, b""
    where = f"{package.location}: {MANIFEST_PATH}"
    manifest = parse_peer_manifest(package.read_file(MANIFEST_PATH), where)
    if CODEC_PATH not in files:
        return manifest, b""
    try:
        codec = load(package.read_file(CODEC_PATH))[_CODEC]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{package.location}: {CODEC_PATH}: {error}") from error
    return manifest, codec.tobytes()
