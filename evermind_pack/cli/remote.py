"""Options of every command that reads a package from a server."""

from __future__ import annotations

import argparse
from typing import Any

from evermind_runtime.stores.options import RemoteOptions


def add_remote_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which package alone will do, and how far the network may be used."""
    group = parser.add_argument_group("packages at a URL (docs/network.md)")
    group.add_argument(
        "--digest", metavar="SHA256", help="refuse any other package than the one with this digest"
    )
    group.add_argument(
        "--offline",
        action="store_true",
        help="use only what is in the cache (or EVERMIND_OFFLINE=1)",
    )
    group.add_argument(
        "--allow-private",
        action="store_true",
        help="let a public server redirect to private addresses",
    )
    return group


def remote_options(args: argparse.Namespace, **more: Any) -> RemoteOptions:
    """What was chosen, the rest from the environment. Raises `InputError`."""
    chosen: dict[str, Any] = {"allow_private": args.allow_private, **more}
    if getattr(args, "digest", None) is not None:
        chosen["digest"] = args.digest
    if getattr(args, "offline", False):
        chosen["offline"] = True
    return RemoteOptions(**chosen)
