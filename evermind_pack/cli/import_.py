"""`evermind-pack import`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evermind_manifests.errors import LocationError, MissingExtraError
from evermind_manifests.manifest import Card

from .export import check_text, print_result
from .options import add_card, add_layout, add_output
from .terminal import human_bytes, remark, seconds, stages

EXAMPLES = """\
  evermind-pack import ./OLMoE-1B-7B -o olmoe/
  evermind-pack import ./Mixtral-8x7B -o mixtral.zip --dtype f16
  evermind-pack run olmoe/ --prompt "The capital of France" --budget 2GiB"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, destination and how expert weights are stored."""
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="a checkpoint folder on this machine: config.json, safetensors files, and "
        "tokenizer.json where there is one",
    )
    add_output(parser)
    parser.add_argument(
        "--dtype",
        choices=("keep", "f16", "bf16", "f32"),
        default="keep",
        help="what expert weights are stored as; keep: bit by bit what the checkpoint has "
        "(default: keep)",
    )
    add_layout(parser)
    parser.add_argument("--name", help="the package's name (default: the folder's)")
    add_card(parser)
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin anew where an import was cut off; without it, the same command goes on from "
        "there",
    )


def run(args: argparse.Namespace) -> int:
    """Import, then say what was written."""
    if not args.source.is_dir():
        raise LocationError(
            f"{args.source}: expected a checkpoint folder",
            hint="Download the model first; nothing is fetched from the network.",
        )
    check_text(args, args.source.resolve().name)
    try:
        from evermind_exporters.huggingface.import_ import ImportOptions, import_checkpoint
    except ImportError as error:
        raise MissingExtraError(
            error.name or "onnx", "hf", "Importing Hugging Face checkpoints"
        ) from error

    options = ImportOptions(
        dtype=args.dtype,
        layout=args.layout,
        name=args.name,
        card=Card(
            description=args.description,
            license=args.license,
            author=args.author,
            tags=tuple(args.tag),
        ),
        overwrite=args.force,
        restart=args.restart,
    )
    silent = args.quiet or args.json
    begin = time.monotonic()
    with _told_what_is_left(args), stages(quiet=silent) as (stage, advance):
        result = import_checkpoint(args.source, args.output, options, progress=advance, stage=stage)
    took = time.monotonic() - begin
    for note in result.notes:
        remark(f"note: {note}", quiet=silent)
    print_result(
        args,
        result.digest,
        {
            "architecture": result.architecture,
            "parity_error": result.parity_error,
            "seconds": round(took, 3),
            "notes": result.notes,
        },
        {"parity": f"off by {result.parity_error:.1e} of the largest logit", "took": seconds(took)},
    )
    return 0


@contextmanager
def _told_what_is_left(args: argparse.Namespace) -> Iterator[None]:
    """After Ctrl-C, say what is there and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        from evermind_manifests.writer import unfinished

        if left := unfinished(args.output):
            remark(
                f"{left.shards:,} experts ({human_bytes(left.bytes)}) are kept in {left.folder}: "
                "the same command goes on from there, --restart begins anew",
                quiet=args.quiet,
            )
        raise
