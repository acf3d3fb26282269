"""`evermind-pack validate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from evermind_manifests.location import read_head
from evermind_manifests.package import Package
from evermind_manifests.problems import Problem
from evermind_manifests.validate import Report, validate

from .terminal import Progress, print_json, progress

EXAMPLES = """\
  evermind-pack validate shakespeare/
  evermind-pack validate shakespeare/ --deep --run
  evermind-pack validate shakespeare.zip --deep --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The package and how deep to look."""
    parser.add_argument("package", metavar="PKG", help="a package folder or .zip file")
    parser.add_argument(
        "--deep", action="store_true", help="check every digest, shard header and graph"
    )
    parser.add_argument(
        "--run", action="store_true", help="run the parity cases and compare the results"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is the report's (0 ok, 1 invalid, 3 integrity)."""
    with progress("validating", quiet=args.quiet or args.json) as advance:
        report = check_package(args.package, deep=args.deep, parity=args.run, progress=advance)
    if args.json:
        print_json(report.to_dict())
    elif not (args.quiet and report.ok):
        print(report.render())
    return report.exit_code


def check_package(location: str | Path, *, deep: bool, parity: bool, progress: Progress) -> Report:
    """Validate a package, its parity cases run by the runtime if asked for.

    Raises `LocationError` for a place that is not there: a mistake of usage, no finding.
    """
    read_head(location, 1)
    return validate(location, deep=deep, run=_parity if parity else None, progress=progress)


def _parity(package: Package) -> list[Problem]:
    from evermind_runtime.parity import parity_problems

    return parity_problems(package)
