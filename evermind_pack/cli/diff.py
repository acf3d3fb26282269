"""`evermind-pack diff`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from evermind_runtime.openers import open_location
from evermind_runtime.transfer.diff import Difference, diff_manifests

from .remote import add_remote_arguments, remote_options
from .terminal import counted, human_bytes, print_json, print_table

EXAMPLES = """\
  evermind-pack diff shakespeare-v1/ shakespeare-v2/
  evermind-pack diff shakespeare/ https://models.example.org/shakespeare/ --json"""

_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two packages."""
    parser.add_argument("old", metavar="A", help="a package: folder, .zip or URL")
    parser.add_argument("new", metavar="B", help="the package to compare it with")
    add_remote_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Compare two manifests. The exit code is 0 whether they differ or not."""
    options = remote_options(args)
    # The digest is the new package's: the old one is what is there.
    with open_location(args.old, replace(options, digest=None)) as old:
        before, old_digest = old.manifest, old.digest
    with open_location(args.new, options) as new:
        difference = diff_manifests(before, new.manifest)
        new_digest = new.digest
    if args.json:
        print_json({"old": old_digest, "new": new_digest, **difference.to_dict()})
        return 0
    rows = {"A": old_digest, "B": new_digest}
    print_table(rows | (_rows(difference) if not difference.same else {"files": "the same"}))
    return 0


def _rows(found: Difference) -> dict[str, str]:
    rows = {
        name: _list(paths)
        for name, paths in (
            ("added", found.added),
            ("removed", found.removed),
            ("changed", found.changed),
        )
        if paths
    }
    if found.experts:
        rows["experts"] = _list([f"layer {layer} expert {one}" for layer, one in found.experts])
    rows["to fetch"] = (
        f"{human_bytes(found.fetch_bytes)} of {human_bytes(found.total_bytes)}, "
        f"{counted(found.fetch_blobs, 'blob')} in {counted(found.fetch_requests, 'request')}"
    )
    return rows


def _list(names: tuple[str, ...] | list[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
