"""What a model will need from a server before its first token, fetched together."""

from __future__ import annotations

import os

from evermind_manifests.errors import EvermindPackError, InputError
from evermind_manifests.manifest import GraphStep, Manifest
from evermind_manifests.package import Package

from ..layers import expert_layers
from ..profile import PROFILE_NAME, parse_profile, read_profile
from .blobs import Blob
from .cached import CachedStore
from .options import RemoteOptions


def warm_up(package: Package, options: RemoteOptions) -> None:
    """Fetch what every run needs, several files at a time; then hot experts, if asked for.

    Does nothing for a package that lies here. Raises what reading raises, and `InputError`
    for a prefetch without a profile.
    """
    store = package.store
    if not isinstance(store, CachedStore):
        return
    try:
        store.fetch(store.blobs_of(files_of_every_run(package.manifest)))
    except EvermindPackError:
        raise
    except OSError as error:
        store.cache_failed(error)
    if options.prefetch:
        store.prefetch(hot_experts(package, store)[: _that_fit(package, options.cache_bytes)])


def files_of_every_run(manifest: Manifest) -> list[str]:
    """The files a model opens before its first token: graphs, resident part, tokenizer."""
    graphs = [
        step.graph
        for step in (*manifest.plan.prefill, *manifest.plan.decode)
        if isinstance(step, GraphStep)
    ]
    kinds = [kind.graph for kind in manifest.kinds.values()]
    named = [*graphs, *kinds, manifest.resident, manifest.tokenizer and manifest.tokenizer.file]
    return list(dict.fromkeys(path for path in named if path in manifest.files))


def hot_experts(
    package: Package, store: CachedStore, profile: str | os.PathLike[str] | None = None
) -> list[Blob]:
    """The shards a profile (a file; by default the package's own) calls hot, hottest first.

    Raises `InputError` where there is no profile, or one of another model.
    """
    layers = expert_layers(package.manifest)
    if profile is not None:
        return store.blobs_of_experts(read_profile(profile, layers).hottest())
    if PROFILE_NAME not in package.manifest.files:
        raise InputError(
            f"{package.location}: expected a {PROFILE_NAME}, which says what to prefetch;"
            " there is none",
            hint="`evermind-pack trace` records one; without it, experts are fetched as needed.",
        )
    own = parse_profile(package.read_file(PROFILE_NAME), layers, PROFILE_NAME)
    return store.blobs_of_experts(own.hottest())


def _that_fit(package: Package, cache_bytes: int) -> int:
    """How many experts the cache holds beside the rest."""
    largest = max((shard.bytes for shard in package.manifest.shards), default=1)
    return cache_bytes // max(1, largest)
