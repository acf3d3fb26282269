"""`evermind-pack serve`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from evermind_manifests.errors import InputError
from evermind_runtime.openers import open_location
from evermind_runtime.serving import PackageServer
from evermind_runtime.serving.static import Options

from .remote import add_remote_arguments, remote_options
from .terminal import print_json, remark

EXAMPLES = """\
  evermind-pack serve shakespeare/
  evermind-pack serve shakespeare.zip --port 9000 --isolate --mount app=./dist
  evermind-pack serve https://models.example.org/shakespeare/ --host 0.0.0.0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The package, the address, and what browsers are told."""
    parser.add_argument(
        "package", metavar="PKG", help="a package folder, .zip file, or URL (then a mirror of it)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--cors",
        metavar="ORIGIN",
        default="*",
        help="which pages may read: an origin like https://example.org, * or none (default: *)",
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="send COOP and COEP, which give a page threads and shared memory",
    )
    parser.add_argument(
        "--mount",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="serve the files of a folder below /NAME/, e.g. the page; repeatable",
    )
    add_remote_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, then end with 0."""
    options = Options(
        cors=None if args.cors == "none" else _origin(args.cors),
        isolate=args.isolate,
        log=None if args.quiet or args.json else remark,
    )
    mounts = _mounts(args.mount)
    with (
        open_location(args.package, remote_options(args)) as package,
        PackageServer(package, args.host, args.port, mounts=mounts, options=options) as server,
    ):
        if args.json:
            print_json({"url": server.url, "package": package.location, "digest": package.digest})
            sys.stdout.flush()  # whoever started us waits for it
        else:
            remark(f"{package.manifest.name} at {server.url} (Ctrl-C ends)", quiet=args.quiet)
        _serve(server)
    return 0


def _serve(server: PackageServer) -> None:
    """Until a signal; `shutdown` must not be called from the thread that serves."""
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        ended.wait()
    finally:
        server.shutdown()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _origin(text: str) -> str:
    if any(ord(character) <= 32 or ord(character) == 127 for character in text) or not text:
        raise InputError(f"--cors: expected an origin like https://example.org, found {text!r}")
    return text


def _mounts(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--mount: expected NAME=DIR, found {text!r}")
        found[name] = folder
    return found
