"""`evermind-pack pull`."""

from __future__ import annotations

import argparse
from pathlib import Path

from evermind_manifests.errors import InputError
from evermind_manifests.package import Package
from evermind_runtime.openers import open_location
from evermind_runtime.stores.blobs import Blob
from evermind_runtime.stores.cached import CachedStore
from evermind_runtime.stores.warm_up import files_of_every_run, hot_experts
from evermind_runtime.transfer import copy_package, open_target

from .remote import add_remote_arguments, remote_options
from .terminal import human_bytes, print_json, print_table, progress

EXAMPLES = """\
  evermind-pack pull https://models.example.org/shakespeare/
  evermind-pack pull https://models.example.org/shakespeare.zip --experts profile
  evermind-pack pull s3://bucket/shakespeare/ -o shakespeare/
  evermind-pack pull https://models.example.org/shakespeare/ --experts none --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The package, where to, and which experts."""
    parser.add_argument("package", metavar="URL", help="a package on a server")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        help="copy the package to this folder, or turn the one that is there into it (default: "
        "fetch it into the cache, for runs with this URL)",
    )
    parser.add_argument(
        "--experts",
        metavar="WHICH",
        help="all, none, profile (those the package's profile.json calls hot), or a profile of "
        "your own (default: all)",
    )
    add_remote_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fetch what is missing; Ctrl-C leaves what arrived, and the same command goes on."""
    if args.output is not None and args.experts not in (None, "all"):
        raise InputError(
            f"--experts {args.experts} fetches into the cache: a folder gets the whole package",
            hint="Leave out -o, or --experts.",
        )
    options = remote_options(args)
    with open_location(args.package, options) as package:
        store = package.store
        if not isinstance(store, CachedStore):
            raise InputError(
                f"{args.package}: expected the URL of a package, found one that is here already",
                hint="`evermind-pack push` copies it elsewhere.",
            )
        with progress("fetching", quiet=args.quiet or args.json, unit="bytes") as advance:
            if args.output is not None:
                target = open_target(str(args.output), options)
                copied = copy_package(package, target, advance, concurrency=options.concurrency)
                fetched, place = copied.sent_bytes, str(args.output)
            else:
                fetched = store.fetch(_wanted(package, store, args.experts), advance)
                place = str(options.cache_folder)
        total = sum(entry.bytes for entry in package.manifest.files.values())
        result = {
            "package": package.location,
            "digest": package.digest,
            "output": place,
            "bytes_fetched": fetched,
            "bytes_total": total,
        }
    if args.json:
        print_json(result)
    elif not args.quiet:
        print_table(
            {
                "package": f"{package.manifest.name} ({package.digest})",
                "fetched": f"{human_bytes(fetched)} of {human_bytes(total)}",
                "to": place,
            }
        )
    return 0


def _wanted(package: Package, store: CachedStore, experts: str | None) -> list[Blob]:
    """Without experts only what a run opens anyway; with all of them every file."""
    manifest = package.manifest
    if experts in (None, "all"):
        return store.blobs_of(manifest.files)
    always = store.blobs_of(files_of_every_run(manifest))
    if experts == "none":
        return always
    profile = None if experts == "profile" else experts
    return [*always, *hot_experts(package, store, profile)]
