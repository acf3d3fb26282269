"""What a package consists of by content, and which ranges to fetch for it: pure plans.

A blob is what has a sha256 in the manifest: a shard, or a file without shards. Blobs that
lie close together in one file are fetched with one request, as a request costs a round trip
whatever its size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evermind_manifests.manifest import Manifest

# Bytes worth fetching in vain to save a request: 100 ms at 5 Mbit/s.
MAX_GAP = 64 * 1024
# Bounds what a broken request loses, and how long one keeps others waiting.
MAX_FETCH = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Blob:
    """`bytes` bytes of `path` from `offset`, with the sha256 `digest`."""

    digest: str
    path: str
    offset: int
    bytes: int

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.offset + self.bytes


@dataclass(frozen=True, slots=True)
class Fetch:
    """One request: a range of one file with the blobs in it, in file order."""

    path: str
    offset: int
    bytes: int
    blobs: tuple[Blob, ...]


def blobs_by_path(manifest: Manifest) -> dict[str, list[Blob]]:
    """Every file's blobs in file order; a pool's padding belongs to none."""
    found: defaultdict[str, dict[int, Blob]] = defaultdict(dict)
    for shard in manifest.shards:
        blob = Blob(shard.sha256, shard.file, shard.offset, shard.bytes)
        found[shard.file][shard.offset] = blob
    for path, entry in manifest.files.items():
        if path not in found:
            found[path][0] = Blob(entry.sha256, path, 0, entry.bytes)
    return {path: [blobs[at] for at in sorted(blobs)] for path, blobs in found.items()}


def plan_fetches(
    blobs: Iterable[Blob], *, max_gap: int = MAX_GAP, max_bytes: int = MAX_FETCH
) -> list[Fetch]:
    """The requests that fetch `blobs` (most urgent first), each digest once.

    Neighbours in a file whose gap is at most `max_gap` share a request of at most
    `max_bytes`; a larger blob has one of its own. A request is as urgent as its most urgent
    blob.
    """
    wanted: dict[str, Blob] = {}
    for blob in blobs:
        wanted.setdefault(blob.digest, blob)
    urgency = {digest: at for at, digest in enumerate(wanted)}
    files: defaultdict[str, list[Blob]] = defaultdict(list)
    for blob in wanted.values():
        files[blob.path].append(blob)
    fetches: list[Fetch] = []
    for path, members in files.items():
        members.sort(key=lambda blob: (blob.offset, blob.end))
        for group in _groups(members, max_gap, max_bytes):
            begin, end = group[0].offset, group[-1].end
            fetches.append(Fetch(path, begin, end - begin, tuple(group)))
    return sorted(fetches, key=lambda one: min(urgency[blob.digest] for blob in one.blobs))


def _groups(blobs: Sequence[Blob], max_gap: int, max_bytes: int) -> Iterable[list[Blob]]:
    group: list[Blob] = []
    for blob in blobs:
        if group:
            gap = blob.offset - group[-1].end
            if not 0 <= gap <= max_gap or blob.end - group[0].offset > max_bytes:
                yield group
                group = []
        group.append(blob)
    if group:
        yield group
