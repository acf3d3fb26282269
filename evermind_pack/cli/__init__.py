"""The command line: `evermind-pack COMMAND …`. Each command is a module, imported when called."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from keyword import iskeyword
from typing import Protocol, cast

from evermind_manifests.errors import EvermindPackError

from .terminal import INTERRUPTED

# Name → what it does, in the order a user meets them.
COMMANDS = {
    "demo": "train, export, validate and run a small language model, start to end",
    "train": "train a model and write a run folder",
    "export": "write a trained model or a peer's checkpoint as a package",
    "import": "write a Hugging Face checkpoint with experts as a package",
    "inspect": "show what a package holds and which budgets make sense",
    "validate": "check a package: structure, files, digests, graphs, results",
    "plan": "forecast whether and how fast a model runs here, before any weight is read",
    "run": "generate text, or run arrays through a package, under a memory budget",
    "bench": "measure speed under several budgets, against the machine's bound",
    "trace": "record which experts tokens use, and replay it under every policy",
    "convert": "write a package's model as others have it: the peer's files, or a checkpoint",
    "pull": "fetch a package from a server, or only the experts it is likely to need",
    "push": "copy a package to a folder, a web server or a bucket: only what is not there",
    "diff": "show what changed between two packages, and what an update would fetch",
    "serve": "serve a package to browsers and other machines",
    "cache": "show, check and clear what was fetched from servers",
}


class Command(Protocol):
    """What a command module provides."""

    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's own arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 ok, 1 failed, 2 usage, 3 integrity."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return _top_level(arguments)
    # None where the caller closed it (`>&-`): nothing is to be said there.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows its number, rather than an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    as_json = "--json" in arguments
    try:
        code = _run(name, arguments[1:])
        # Now, while a full disk or a closed pipe can still be reported.
        sys.stdout.flush()
        return code
    except EvermindPackError as error:
        _report(error, as_json)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): nothing more to say, and not an error.
        _drop_output()
        return 0
    except OSError as error:
        _report(EvermindPackError(f"the system refused: {error}"), as_json)
        return 1


def _drop_output() -> None:
    """Let what stdout still holds go nowhere, so that the interpreter's exit does not fail."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(name: str, arguments: Sequence[str]) -> int:
    # `import_`: a module cannot be called like a keyword.
    module = f"{name}_" if iskeyword(name) else name
    command = cast(Command, importlib.import_module(f"{__name__}.{module}"))
    parser = argparse.ArgumentParser(
        prog=f"evermind-pack {name}",
        description=COMMANDS[name][0].upper() + COMMANDS[name][1:] + ".",
        epilog=f"examples:\n{command.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no remarks")
    return command.run(parser.parse_args(arguments))


def _top_level(arguments: Sequence[str]) -> int:
    from importlib import metadata

    listed = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="evermind-pack",
        description="Turn Mixture-of-Experts models into packages whose experts can be paged, "
        "and run them where memory is small.",
        epilog=f"commands:\n{listed}\n\n`evermind-pack COMMAND --help` shows a command's options "
        "and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"evermind-pack {metadata.version('evermind-pack')}"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    if not arguments:
        parser.print_help()
        return 2
    parser.parse_args(arguments)
    return 2


def _report(error: EvermindPackError, as_json: bool) -> None:
    kind = type(error).__name__
    try:
        sys.stdout.flush()
        if as_json:
            body = {"type": kind, "message": error.message, "hint": error.hint}
            print(json.dumps({"error": body}), flush=True)
            return
    except OSError:
        _drop_output()  # stdout is what failed
    print(f"{kind}: {error}", file=sys.stderr)
