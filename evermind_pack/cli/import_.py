"""`evermind-pack import`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from evermind_manifests.errors import InputError, LocationError, MissingExtraError
from evermind_manifests.manifest import Card
from evermind_manifests.staging import Staging

from .export import check_text, print_result
from .options import add_card, add_layout, add_output, add_revision, add_stored_as
from .terminal import Progress, counted, human_bytes, remark, seconds, stages

if TYPE_CHECKING:
    from evermind_exporters.huggingface.import_ import HalfResult

EXAMPLES = """\
  evermind-pack plan ./OLMoE-1B-7B          # before: will it fit, in memory and on the disk?
  evermind-pack import ./OLMoE-1B-7B -o olmoe/
  evermind-pack import ./Mixtral-8x7B -o mixtral.zip --dtype f16
  evermind-pack import ./Qwen3-30B-A3B -o qwen3/ --compute both
  evermind-pack import allenai/OLMoE-1B-7B-0125 -o olmoe/ --revision main
  evermind-pack run olmoe/ --prompt "The capital of France" --budget 2GiB"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, destination and how expert weights are stored."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a checkpoint folder on this machine (config.json, safetensors files, and "
        "tokenizer.json where there is one), or the name of a model on a hub, as org/name",
    )
    add_revision(parser)
    add_output(parser)
    add_stored_as(parser)
    parser.add_argument(
        "--compute",
        choices=("f32", "both"),
        default="f32",
        help="both: add graphs that compute in half precision, for CUDA; of the dtype most weights "
        "are stored in (default: f32)",
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
    from evermind_exporters.huggingface.hub import is_model_id
    from evermind_exporters.huggingface.misfits import no_folder

    local = Path(args.source)
    if not local.is_dir() and not (is_model_id(args.source) and not local.exists()):
        raise LocationError(
            f"{args.source}: expected a checkpoint folder, or a model's name as org/name",
            hint=no_folder(local),
        )
    if local.is_dir() and args.revision is not None:
        raise InputError(
            f"--revision {args.revision}: {args.source} is a folder, which has no revisions",
            hint="Give a name as org/name that is no folder here.",
        )
    name = local.resolve().name if local.is_dir() else local.name
    check_text(args, name)
    try:
        from evermind_exporters.huggingface.import_ import ImportOptions, import_checkpoint
    except ImportError as error:
        raise MissingExtraError(
            error.name or "onnx", "hf", "Importing Hugging Face checkpoints"
        ) from error

    options = ImportOptions(
        dtype=args.dtype or "keep",
        trunk=args.trunk,
        compute=args.compute,
        layout=args.layout,
        name=args.name or name,
        card=Card(
            description=args.description,
            license=args.license,
            author=args.author,
            tags=tuple(args.tag),
            base_model=None if local.is_dir() else args.source,
        ),
        overwrite=args.force,
        restart=args.restart,
    )
    silent = args.quiet or args.json
    begin = time.monotonic()
    with _told_what_is_left(args), stages(quiet=silent) as (stage, advance):
        folder = local if local.is_dir() else _fetch(args, stage, advance)
        result = import_checkpoint(folder, args.output, options, progress=advance, stage=stage)
    took = time.monotonic() - begin
    half = result.half
    for note in result.notes:
        remark(f"note: {note}", quiet=silent)
    print_result(
        args,
        result.digest,
        {
            "architecture": result.architecture,
            "parity_error": result.parity_error,
            "half": None if half is None else asdict(half),
            "seconds": round(took, 3),
            "notes": result.notes,
        },
        {
            "parity": f"off by {result.parity_error:.1e} of the largest logit",
            **_half_lines(half),
            "took": seconds(took),
        },
    )
    return 0


def _half_lines(half: HalfResult | None) -> dict[str, str]:
    if half is None:
        return {}
    own = f"transformers in {half.compute}: {half.own_error:.1e}"
    return {half.compute: f"most tokens off by up to {half.error:.1e} ({own})"}


def _fetch(args: argparse.Namespace, stage: Callable[[str], None], advance: Progress) -> Path:
    """The folder with a hub's model, fetched once nothing here stands against the import."""
    from evermind_exporters.huggingface.hub import fetch_checkpoint
    from evermind_exporters.huggingface.trace import require_transformers

    require_transformers()
    Staging(args.output, overwrite=args.force).check_destination()
    stage(f"fetching {args.source}")
    return fetch_checkpoint(args.source, args.revision, progress=advance)


@contextmanager
def _told_what_is_left(args: argparse.Namespace) -> Iterator[None]:
    """After Ctrl-C, say what is there and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        from evermind_manifests.staging import unfinished

        if left := unfinished(args.output):
            remark(
                f"{counted(left.shards, 'expert')} ({human_bytes(left.bytes)}) are kept in "
                f"{left.folder}: the same command goes on from there, --restart begins anew",
                quiet=args.quiet,
            )
        raise
