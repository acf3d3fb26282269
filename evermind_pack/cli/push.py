"""`evermind-pack push`."""

from __future__ import annotations

import argparse

from evermind_runtime.openers import open_location
from evermind_runtime.transfer import copy_package, open_target

from .remote import add_remote_arguments, remote_options
from .terminal import counted, human_bytes, print_json, print_table, progress

EXAMPLES = """\
  evermind-pack push shakespeare/ /srv/www/models/shakespeare/
  evermind-pack push shakespeare/ s3://bucket/models/shakespeare/
  evermind-pack push shakespeare.zip https://user:password@dav.example.org/shakespeare/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The package and where to."""
    parser.add_argument("package", metavar="PKG", help="a package folder, .zip file or URL")
    parser.add_argument(
        "destination",
        metavar="DEST",
        help="a folder, or a URL: http(s) (by PUT), s3://, gs://, az://; a package that is there "
        "becomes this one",
    )
    add_remote_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Send what is not there; Ctrl-C leaves what was sent, and the same command goes on."""
    options = remote_options(args)
    with open_location(args.package, options) as package:
        target = open_target(args.destination, options)
        with progress("bytes", quiet=args.quiet or args.json) as advance:
            copied = copy_package(package, target, advance, concurrency=options.concurrency)
        digest = package.digest
    if args.json:
        print_json(
            {
                "destination": target.location,
                "digest": digest,
                "files_sent": copied.sent,
                "bytes_sent": copied.sent_bytes,
                "files_kept": copied.kept,
            }
        )
    elif not args.quiet:
        print_table(
            {
                "sent": f"{counted(copied.sent, 'file')}, {human_bytes(copied.sent_bytes)}",
                "there already": counted(copied.kept, "file"),
                "to": target.location,
                "digest": digest,
            }
        )
    return 0
