"""Options that several commands take, with the same meaning and the same words."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from .terminal import positive_int

# Longer than any model's context, and short enough to be made and counted.
MOST_TOKENS: Final = 1 << 24

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_sampling(parser: argparse._ArgumentGroup) -> None:
    """How the next token is chosen; what is not given, the package says."""
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        help="0 takes the likeliest token (default: the package's)",
    )
    parser.add_argument(
        "--top-k", metavar="K", type=int, help="draw from the K likeliest (default: the package's)"
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="draw from the likeliest that together reach P (default: the package's)",
    )
    parser.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        help="draw from those at least P times as likely as the likeliest (default: the package's)",
    )
    parser.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        help="above 1: tokens that were there are less likely (default: the package's)",
    )
    parser.add_argument("--seed", type=int, help="of the sampler (default: 1)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`, which `thread_count` reads."""
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="compute threads (default: all cores, one for small matrices)",
    )


def thread_count(args: argparse.Namespace) -> int | None:
    """What `--threads` says. Raises `DeviceError`, as loading would, before anything is done."""
    from evermind_runtime.choose_threads import check_threads
    from evermind_runtime.onnx_runtime import usable_cores

    threads: int | None = args.threads
    check_threads(threads, usable_cores())
    return threads


def token_count(text: str) -> int:
    """An argument's value that counts tokens of a sequence."""
    value = positive_int(text)
    if value > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_TOKENS}, found {value}")
    return value


def add_policy(parser: argparse.ArgumentParser) -> None:
    """`--policy` and `--profile`: which experts stay in memory."""
    parser.add_argument(
        "--policy",
        choices=("decayed", "lru", "pinned"),
        default="decayed",
        help="which expert to give up when the budget is spent (default: decayed)",
    )
    parser.add_argument(
        "--profile",
        metavar="JSON",
        type=Path,
        help="what --policy pinned keeps (default: the package's own profile.json)",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """`--io` and `--guess`: how and when experts are read."""
    parser.add_argument(
        "--io",
        choices=("auto", "direct", "buffered"),
        default="auto",
        help="read experts directly from the disk, or through the page cache (default: what "
        "should be the faster)",
    )
    parser.add_argument(
        "--guess",
        choices=("auto", "on", "off"),
        default="auto",
        help="read what the next layer will probably need while this one runs, as long as it is "
        "right more often than not (default: auto: not where large experts on this machine are "
        "read while others of their layer run)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """`-o`: the package that is written."""
    parser.add_argument(
        "-o",
        "--output",
        metavar="PKG",
        type=Path,
        required=True,
        help="the package to write: a folder, or one file if it ends in .zip",
    )


def add_revision(parser: argparse.ArgumentParser) -> None:
    """`--revision`, of a model by its name."""
    parser.add_argument(
        "--revision", help="a branch, tag or commit of a model on a hub (default: main)"
    )


def add_stored_as(parser: argparse.ArgumentParser, of: str = "") -> None:
    """`--dtype` and `--trunk` of an import; `of` says what they are for, where that is not all."""
    parser.add_argument(
        "--dtype",
        choices=("keep", "f16", "bf16", "f32"),
        help=f"{of}what weights are stored as; keep: bit by bit what the checkpoint has "
        "(default: keep)",
    )
    parser.add_argument(
        "--trunk",
        choices=("keep", "f16", "bf16", "f32"),
        help=f"{of}the same for all weights but the experts'; f32 takes twice the memory of half "
        "precision, and is faster on many threads (default: as --dtype)",
    )


def add_layout(parser: argparse.ArgumentParser) -> None:
    """`--layout`: how its shards lie in files."""
    parser.add_argument(
        "--layout",
        choices=("files", "pool"),
        default="files",
        help="one file per expert, or pools of many (default: files)",
    )


def add_card(parser: argparse.ArgumentParser) -> None:
    """What the model card says, and `--force`."""
    parser.add_argument("--license", help="an SPDX identifier for the model card")
    parser.add_argument("--author", help="who made the model, for the model card")
    parser.add_argument("--description", default="", help="what the model is, for the card")
    parser.add_argument("--tag", action="append", default=[], help="a tag for the card; repeatable")
    parser.add_argument("--force", action="store_true", help="replace an existing package")
