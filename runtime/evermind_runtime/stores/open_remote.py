"""From a URL to an open package: its manifest first, everything else when it is needed."""

from __future__ import annotations

import os
from contextlib import suppress

from evermind_manifests.errors import (
    DigestError,
    IntegrityError,
    ManifestError,
    MissingFileError,
    OfflineError,
)
from evermind_manifests.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    package_digest,
    parse_manifest,
)
from evermind_manifests.package import Package
from evermind_manifests.problems import raise_errors
from evermind_manifests.structure import check_structure

from .cached import CachedStore
from .disk_cache import DiskCache
from .options import RemoteOptions
from .records import Records
from .remote import RemoteStore, StreamStore
from .remote_zip import RemoteZip
from .urls import HTTP_SCHEMES, Url, parse_location


def open_remote_package(location: str, options: RemoteOptions) -> Package:
    """The package at a URL, its files read through the cache.

    Only the manifest is fetched, and not even that if `options` pin a package that is in the
    cache. Raises `LocationError`, `NetworkError`, `MissingExtraError`, `DigestError` for a
    package other than the one pinned, `OfflineError` for one that is not in the cache, or
    what `open_package` raises.
    """
    url = parse_location(location)
    cache = DiskCache(options.cache_folder, options.cache_bytes)
    if options.offline:
        return _package(None, cache, _from_cache(url, cache, options), url, options)
    remote = open_remote_store(location, options)
    try:
        data = _cached_manifest(cache, options.digest) if options.digest else None
        if data is None:
            data = _fetch_manifest(remote)
            check_pin(package_digest(data), options.digest, url.shown)
        package = _package(remote, cache, data, url, options)
    except BaseException:
        remote.close()
        raise
    # Without a cache the package runs all the same; reading says what is wrong with it.
    with suppress(OSError):
        os.close(cache.fetch(package.digest, len(data), lambda begin, sink: sink(data[begin:])))
        Records(cache.root).note(url.shown, package.digest)
    return package


def open_remote_store(location: str, options: RemoteOptions) -> StreamStore:
    """The files at a URL as they are there, uncached and unchecked.

    Raises `LocationError`, `MissingExtraError`; for a zip also what reading its directory
    raises.
    """
    url = parse_location(location)
    archive: RemoteStore
    if url.scheme in HTTP_SCHEMES:
        from .http import HttpStore

        archive = HttpStore(url, options)
    else:
        from .objects import ObjectReader, connect

        store, name = connect(url, options)
        archive = ObjectReader(store, url.shown, options, name)
    if url.is_folder:
        return archive
    try:
        return RemoteZip(archive)
    except BaseException:
        archive.close()
        raise


def check_pin(found: str, expected: str | None, location: str) -> None:
    """Raise `DigestError` if a package is not the one asked for."""
    if expected is not None and found != expected:
        raise DigestError(
            f"{location}: another package than the one asked for\n"
            f"  expected {expected}\n"
            f"  found    {found}",
            hint="The package was replaced, or the digest is another's: `evermind-pack inspect`"
            " shows it.",
        )


def _package(
    remote: StreamStore | None, cache: DiskCache, data: bytes, url: Url, options: RemoteOptions
) -> Package:
    where = f"{url.shown}: {MANIFEST_NAME}"
    manifest = parse_manifest(data, where)
    raise_errors(check_structure(manifest), where, ManifestError)
    store = CachedStore(remote, cache, manifest, data, url.shown, concurrency=options.concurrency)
    return Package(store, manifest, package_digest(data))


def _fetch_manifest(remote: StreamStore) -> bytes:
    """In one request, bounded."""
    try:
        return remote.read(MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
    except MissingFileError as error:
        raise ManifestError(
            f"{remote.location}: not a package: {error.message}",
            hint=f"A package is a folder with a {MANIFEST_NAME}, or an uncompressed .zip.",
        ) from error
    except IntegrityError as error:
        raise ManifestError(f"{remote.location}: {error.message}", hint=error.hint) from error


def _from_cache(url: Url, cache: DiskCache, options: RemoteOptions) -> bytes:
    digest = options.digest or Records(cache.root).digest_of(url.shown)
    data = _cached_manifest(cache, digest) if digest else None
    if data is None:
        raise OfflineError(
            f"{url.shown}: not in the cache, and the network may not be used",
            hint=f"Fetch it first: `evermind-pack pull {url.shown}`.",
        )
    return data


def _cached_manifest(cache: DiskCache, digest: str) -> bytes | None:
    try:
        fd = cache.find(digest)
    except OSError:
        return None
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)
