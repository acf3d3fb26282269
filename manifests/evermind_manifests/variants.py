"""The variants of a package: its programs once more, computing in half precision.

Who runs or checks one takes the manifest that `computing` gives, in which it stands in the place
of the float32 programs, and needs to know nothing else of variants.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from .manifest import Half, Manifest


def computing(manifest: Manifest, compute: Half) -> Manifest:
    """`manifest` with its variant `compute`, which it has, as its only programs."""
    variant = manifest.variants[compute]
    kinds = {
        name: replace(
            kind,
            graph=variant.kinds.get(name, kind.graph),
            graph_external=None,
            graph_statistics=None,
        )
        for name, kind in manifest.kinds.items()
    }
    return replace(manifest, plan=variant.plan, kinds=kinds, variants={})


def each_variant(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Of every variant, where it stands and the manifest with it as its only programs."""
    for compute in manifest.variants:
        yield f"variants[{compute!r}].", computing(manifest, compute)
