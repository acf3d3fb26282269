"""What a model will need from a server before its first token, fetched together."""

from __future__ import annotations

from evermind_manifests.errors import EvermindPackError, InputError
from evermind_manifests.manifest import GraphStep, Manifest
from evermind_manifests.package import Package

from ..layers import expert_layers
from ..profile import PROFILE_NAME, parse_profile
from .blobs import Blob
from .cached import CachedStore, Progress
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
    except OSError:
        pass  # without a usable cache each file is read when it is needed
    if options.prefetch:
        store.prefetch(hot_experts(package, store)[: _that_fit(package, options.cache_bytes)])


def fetch_experts(package: Package, blobs: list[Blob], progress: Progress) -> int:
    """Bring files of every run and `blobs` into the cache; the bytes fetched."""
    store = package.store
    assert isinstance(store, CachedStore), "only what lies elsewhere is fetched"
    return store.fetch([*store.blobs_of(files_of_every_run(package.manifest)), *blobs], progress)


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


def hot_experts(package: Package, store: CachedStore) -> list[Blob]:
    """The shards of the package's own profile, hottest first. Raises `InputError` for none."""
    if PROFILE_NAME not in package.manifest.files:
        raise InputError(
            f"{package.location}: expected a {PROFILE_NAME}, which says what to prefetch;"
            " there is none",
            hint="`evermind-pack trace` records one; without it, experts are fetched as needed.",
        )
    layers = expert_layers(package.manifest)
    profile = parse_profile(package.read_file(PROFILE_NAME), layers, PROFILE_NAME)
    return store.blobs_of_experts(profile.hottest())


def _that_fit(package: Package, cache_bytes: int) -> int:
    """How many experts the cache holds beside the rest."""
    largest = max((shard.bytes for shard in package.manifest.shards), default=1)
    return cache_bytes // max(1, largest)
