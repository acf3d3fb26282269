"""What a new version of a package changes, by digest: no file is read but two manifests."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from evermind_manifests.manifest import Manifest

from ..stores.blobs import blobs_by_path, plan_fetches


@dataclass(frozen=True, slots=True)
class Difference:
    """From one package to another.

    `experts` are (layer, expert) whose shard has other content. `fetch_bytes` in
    `fetch_requests` is what somebody who has all of the first must fetch for all of the
    second, its manifest aside; `total_bytes` is all of the second.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    experts: tuple[tuple[int, int], ...]
    experts_added: int
    experts_removed: int
    fetch_bytes: int
    fetch_blobs: int
    fetch_requests: int
    total_bytes: int

    @property
    def same(self) -> bool:
        """No file differs."""
        return not (self.added or self.removed or self.changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"same": self.same}


def diff_manifests(old: Manifest, new: Manifest) -> Difference:
    """What it takes to get from `old` to `new`."""
    known = {blob.digest for blobs in blobs_by_path(old).values() for blob in blobs}
    blobs = [blob for blobs in blobs_by_path(new).values() for blob in blobs]
    fetches = plan_fetches(blob for blob in blobs if blob.digest not in known)
    wanted = [blob for fetch in fetches for blob in fetch.blobs]
    before = {(shard.layer, shard.expert): shard.sha256 for shard in old.shards}
    after = {(shard.layer, shard.expert): shard.sha256 for shard in new.shards}
    both = old.files.keys() & new.files.keys()
    return Difference(
        added=tuple(sorted(new.files.keys() - old.files.keys())),
        removed=tuple(sorted(old.files.keys() - new.files.keys())),
        changed=tuple(
            sorted(path for path in both if old.files[path].sha256 != new.files[path].sha256)
        ),
        experts=tuple(
            sorted(key for key in before.keys() & after.keys() if before[key] != after[key])
        ),
        experts_added=len(after.keys() - before.keys()),
        experts_removed=len(before.keys() - after.keys()),
        fetch_bytes=sum(blob.bytes for blob in wanted),
        fetch_blobs=len(wanted),
        fetch_requests=len(fetches),
        total_bytes=sum(entry.bytes for entry in new.files.values()),
    )
