"""`evermind-pack cache`."""

from __future__ import annotations

import argparse
import time
from typing import Any

from evermind_manifests.errors import EvermindPackError, InputError
from evermind_manifests.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from evermind_runtime.budget import parse_size
from evermind_runtime.stores.blobs import blobs_by_path
from evermind_runtime.stores.disk_cache import DiskCache
from evermind_runtime.stores.options import default_cache_bytes, default_cache_folder
from evermind_runtime.stores.records import Records

from .terminal import counted, human_bytes, print_json, print_table, progress

EXAMPLES = """\
  evermind-pack cache ls
  evermind-pack cache gc --max-size 5GiB
  evermind-pack cache verify --json
  evermind-pack cache clear"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with the cache."""
    parser.add_argument(
        "action",
        choices=("ls", "gc", "verify", "clear"),
        help="ls: what is there; gc: remove what was used longest ago, down to --max-size; "
        "verify: hash everything and remove what is damaged; clear: remove all that is not in use",
    )
    parser.add_argument(
        "--max-size", metavar="SIZE", help="for gc, like 5GiB (default: EVERMIND_CACHE_SIZE, 20GiB)"
    )


def run(args: argparse.Namespace) -> int:
    """Carry it out. `verify` ends with 3 if something was damaged."""
    if args.max_size is not None and args.action != "gc":
        raise InputError(f"--max-size has no meaning with {args.action}")
    cache = DiskCache(default_cache_folder(), default_cache_bytes())
    if args.action == "ls":
        return _list(cache, args)
    if args.action == "verify":
        return _verify(cache, args)
    limit = 0 if args.action == "clear" else _limit(cache, args.max_size)
    freed = cache.evict(limit)
    if args.action == "clear":
        Records(cache.root).clear()
    entries = list(cache.entries())
    left = sum(entry.bytes for entry in entries)
    if args.json:
        print_json(
            {
                "removed": freed.entries,
                "removed_bytes": freed.bytes,
                "left": len(entries),
                "left_bytes": left,
            }
        )
    elif not args.quiet:
        print_table(
            {
                "removed": f"{human_bytes(freed.bytes)} in {counted(freed.entries, 'file')}",
                "left": f"{human_bytes(left)} in {counted(len(entries), 'file')}",
            }
        )
    return 0


def _list(cache: DiskCache, args: argparse.Namespace) -> int:
    entries = list(cache.entries())
    complete = [entry for entry in entries if entry.complete]
    partial = [entry for entry in entries if not entry.complete]
    packages = _packages(cache)
    summary: dict[str, Any] = {
        "folder": str(cache.root),
        "limit": cache.limit,
        "bytes": sum(entry.bytes for entry in entries),
        "objects": len(complete),
        "partial": len(partial),
        "packages": packages,
    }
    if args.json:
        print_json(summary)
        return 0
    oldest = min((entry.used for entry in complete), default=None)
    rows = {
        "folder": summary["folder"],
        "used": f"{human_bytes(summary['bytes'])} of {human_bytes(cache.limit)}",
        "objects": f"{len(complete):,}",
        "partial": f"{len(partial):,} downloads to go on with",
    }
    if oldest is not None:
        rows["oldest use"] = f"{(time.time() - oldest) / 3600:,.1f} hours ago"
    print_table(rows)
    for package in packages:
        print(
            f"{package['digest'][:12]}  {human_bytes(package['cached_bytes']):>12} of "
            f"{human_bytes(package['bytes']):>12}  {package['location']}"
        )
    return 0


def _packages(cache: DiskCache) -> list[dict[str, Any]]:
    """The packages seen, with how much of each is here."""
    held = {entry.digest for entry in cache.entries() if entry.complete}
    found = []
    for record in Records(cache.root):
        manifest = _manifest(cache, record.digest)
        files = {} if manifest is None else blobs_by_path(manifest)
        blobs = [blob for one in files.values() for blob in one]
        found.append(
            {
                "location": record.location,
                "digest": record.digest,
                "bytes": sum(blob.bytes for blob in blobs),
                "cached_bytes": sum(blob.bytes for blob in blobs if blob.digest in held),
            }
        )
    return found


def _manifest(cache: DiskCache, digest: str) -> Manifest | None:
    fd = cache.find(digest)
    if fd is None:
        return None
    with open(fd, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    try:
        return parse_manifest(data)
    except EvermindPackError:
        return None


def _verify(cache: DiskCache, args: argparse.Namespace) -> int:
    with progress("bytes", quiet=args.quiet or args.json) as advance:
        damaged = cache.verify(advance)
    count = sum(entry.complete for entry in cache.entries())
    if args.json:
        print_json({"sound": count, "damaged": damaged})
    elif damaged or not args.quiet:
        rows = {"sound": counted(count, "object")}
        rows["damaged"] = ", ".join(damaged) + " (removed)" if damaged else "none"
        print_table(rows)
    return 3 if damaged else 0


def _limit(cache: DiskCache, text: str | None) -> int:
    return cache.limit if text is None else parse_size(text, None, "--max-size")
