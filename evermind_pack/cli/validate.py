"""`evermind-pack validate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from evermind_manifests.errors import InputError
from evermind_manifests.location import read_head
from evermind_manifests.package import Package
from evermind_manifests.problems import Problem
from evermind_manifests.validate import Report, validate
from evermind_runtime.choose_compute import ComputeName
from evermind_runtime.stores import RemoteOptions, is_url
from evermind_runtime.stores.open_remote import open_remote_store

from .remote import remote_options
from .terminal import Progress, print_json, progress

EXAMPLES = """\
  evermind-pack validate shakespeare/
  evermind-pack validate shakespeare/ --deep --run
  evermind-pack validate shakespeare.zip --deep --json
  evermind-pack validate olmoe/ --run --device cuda
  evermind-pack validate https://models.example.org/shakespeare/ --deep"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The package and how deep to look."""
    parser.add_argument("package", metavar="PKG", help="a package folder, .zip file or URL")
    parser.add_argument(
        "--deep", action="store_true", help="check every digest, shard header and graph"
    )
    parser.add_argument(
        "--run", action="store_true", help="run the parity cases and compare the results"
    )
    parser.add_argument(
        "--device", help="where --run runs them: cpu, cuda or cuda:N (default: cpu)"
    )
    parser.add_argument(
        "--compute",
        choices=get_args(ComputeName),
        help="which graphs --run runs; auto: as `run` chooses them for the device (default: auto)",
    )
    parser.add_argument(
        "--allow-private",
        action="store_true",
        help="let a public server redirect to private addresses",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is the report's (0 ok, 1 invalid, 3 integrity)."""
    if not args.run and (args.device or args.compute):
        raise InputError("--device and --compute say how parity cases run: give --run too")
    with progress("validating", quiet=args.quiet or args.json) as advance:
        report = check_package(
            args.package,
            deep=args.deep,
            parity=args.run,
            progress=advance,
            device=args.device or "cpu",
            compute=args.compute or "auto",
            remote=remote_options(args),
        )
    if args.json:
        print_json(report.to_dict())
    elif not (args.quiet and report.ok):
        print(report.render())
    return report.exit_code


def check_package(
    location: str | Path,
    *,
    deep: bool,
    parity: bool,
    progress: Progress,
    remote: RemoteOptions | None = None,
    device: str = "cpu",
    compute: ComputeName = "auto",
) -> Report:
    """Validate a package, its parity cases run by the runtime on `device` if asked for.

    Of a URL, what the server has is read, and nothing from the cache. Raises `LocationError`
    for a place that is not there: a mistake of usage, no finding; and `NetworkError`.
    """

    def compare(package: Package) -> list[Problem]:
        from evermind_runtime.parity import parity_problems

        return parity_problems(package, device, compute)

    run = compare if parity else None
    if is_url(location):
        with open_remote_store(str(location), remote or RemoteOptions()) as store:
            return validate(store, deep=deep, run=run, progress=progress)
    read_head(location, 1)
    return validate(location, deep=deep, run=run, progress=progress)
