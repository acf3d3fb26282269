"""A package opened for reading: its checked manifest, and its files by name.

Opening reads manifest.json only. The package's identity, `digest`, is that file's sha256.
"""

from __future__ import annotations

import hashlib
import os
from types import TracebackType
from typing import Literal, Self

from .errors import (
    DigestError,
    EvermindPackError,
    InputError,
    IntegrityError,
    ManifestError,
    MissingFileError,
    ShardDigestError,
    TruncatedError,
)
from .manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Half,
    Kind,
    Manifest,
    Shard,
    package_digest,
    parse_manifest,
)
from .problems import raise_errors
from .shard import ShardContents, check_shard, read_shard
from .store import Store, open_store
from .structure import check_structure
from .variants import computing


class Package:
    """An open package; it owns its store. Immutable and safe to share between threads."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        digest: str,
        compute: Literal["f32", "f16", "bf16"] = "f32",
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.digest = digest
        #: What the manifest's programs compute in.
        self.compute = compute
        self._shards = {(shard.layer, shard.expert): shard for shard in manifest.shards}
        self._kinds = {layer.layer: layer.kind for layer in manifest.layers}

    @property
    def location(self) -> str:
        """Where the package lies, for messages."""
        return self.store.location

    def computing(self, compute: Half) -> Package:
        """The same package with its variant `compute`, which it has, for its programs.

        Both own one store: close either.
        """
        return Package(self.store, computing(self.manifest, compute), self.digest, compute)

    def shard(self, layer: int, expert: int) -> Shard:
        """Where an expert's shard lies. Raises `InputError` when there is no such expert."""
        try:
            return self._shards[layer, expert]
        except KeyError:
            raise InputError(f"{self.location}: no expert {expert} in layer {layer}") from None

    def kind_of(self, layer: int) -> tuple[str, Kind]:
        """The name and description of a layer's experts. Raises `InputError`."""
        try:
            name = self._kinds[layer]
        except KeyError:
            raise InputError(f"{self.location}: there is no MoE layer {layer}") from None
        return name, self.manifest.kinds[name]

    def read_file(self, path: str) -> bytes:
        """A file's bytes, once their length and sha256 are those the manifest gives.

        Raises `InputError` for a path not in `files`, `MissingFileError`, `IntegrityError`
        for another length, `DigestError` for other content.
        """
        entry = self.manifest.files.get(path)
        if entry is None:
            raise InputError(f"{self.location}: {path!r} is not a file of this package")
        found = self.store.size(path)
        if found != entry.bytes:
            raise IntegrityError(
                f"{path}: expected {entry.bytes:,} bytes ({MANIFEST_NAME}, files), found {found:,}",
                hint="The file was changed or damaged after packaging. Fetch it again.",
            )
        data = self.store.read(path, limit=entry.bytes)
        check_digest(data, entry.sha256, path, f"files[{path!r}]", DigestError, self.location)
        return data

    def read_shard(self, layer: int, expert: int) -> ShardContents:
        """An expert's weights: digest, header and layout checked against the manifest.

        Raises `ShardDigestError`, `ShardError`, `TruncatedError` or `MissingFileError`.
        """
        shard = self.shard(layer, expert)
        name, kind = self.kind_of(layer)
        where = shard_place(shard)
        data = read_shard_bytes(self.store, shard)
        check_digest(
            data, shard.sha256, where, f"shard {layer}/{expert}", ShardDigestError, self.location
        )
        contents = read_shard(data, where)
        check_shard(contents, kind, shard, where, kind_name=name)
        return contents

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_package(location: str | os.PathLike[str] | Store) -> Package:
    """Open a folder, a single-file package or a store, and check the manifest's structure.

    Raises `LocationError` when nothing is there, `UnsupportedError` for another schema,
    `ManifestError` for what is no package, or naming the first problems and their count. A
    store that was handed in is closed with the package, but not when opening fails.
    """
    own = isinstance(location, str | os.PathLike)
    store = open_store(location) if isinstance(location, str | os.PathLike) else location
    try:
        data = read_manifest(store)
        manifest = parse_manifest(data, f"{store.location}: {MANIFEST_NAME}")
        raise_errors(check_structure(manifest), f"{store.location}: {MANIFEST_NAME}", ManifestError)
        return Package(store, manifest, package_digest(data))
    except BaseException:
        if own:
            store.close()
        raise


def _has(store: Store, path: str) -> bool:
    try:
        store.size(path)
    except EvermindPackError:
        return False
    return True


def read_manifest(store: Store) -> bytes:
    """The bytes of manifest.json. Raises `ManifestError` for none, or one over 64 MiB."""
    try:
        size = store.size(MANIFEST_NAME)
    except MissingFileError as error:
        hint = f"A package is a folder, or an uncompressed zip, with a {MANIFEST_NAME}."
        if _has(store, "config.json"):
            hint += (
                " What has a config.json is a model to make one of: a Hugging Face checkpoint by "
                "`evermind-pack import`, a training run by `evermind-pack export`."
            )
        raise ManifestError(
            f"{store.location}: not a package: {error.message}", hint=hint
        ) from error
    if size > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{store.location}: {MANIFEST_NAME}: expected at most {MAX_MANIFEST_BYTES:,} bytes,"
            f" found {size:,}"
        )
    return store.read(MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)


def read_shard_bytes(store: Store, shard: Shard) -> bytearray:
    """A shard's bytes, unchecked; `TruncatedError` before anything too long is allocated."""
    found = store.size(shard.file) - shard.offset
    if found < shard.bytes:
        raise TruncatedError(
            f"{shard_place(shard)}: expected {shard.bytes} bytes from {shard.offset},"
            f" found {max(0, found)}",
            hint="The file is shorter than the manifest says: fetch or copy it again.",
        )
    data = bytearray(shard.bytes)
    store.read_into(shard.file, shard.offset, memoryview(data))
    return data


def check_digest(
    data: bytes | bytearray | memoryview,
    expected: str,
    path: str,
    field: str,
    error: type[DigestError],
    package: str,
) -> None:
    """Raise `error` unless `data` has the sha256 `expected` (lower-case hex)."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise digest_error(expected, found, path, field, error, package)


def digest_error(
    expected: str, found: str, path: str, field: str, error: type[DigestError], package: str
) -> DigestError:
    """The `error` that says `path` has the sha256 `found`."""
    return error(
        f"{path}: sha256 mismatch\n"
        f"  expected {expected} ({MANIFEST_NAME}, {field})\n"
        f"  found    {found}",
        hint="The file was changed or damaged after packaging. Fetch it again, or run\n"
        f"  `evermind-pack validate {package} --deep` for a full report.",
    )


def shard_place(shard: Shard) -> str:
    """How messages name a shard."""
    return f"{shard.file}@{shard.offset}" if shard.offset else shard.file
