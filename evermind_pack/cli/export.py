"""`evermind-pack export`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evermind_manifests.errors import InputError, MissingExtraError
from evermind_manifests.manifest import Card

from .options import add_card, add_layout, add_output
from .terminal import counted, human_bytes, print_json, print_table, progress, remark

EXAMPLES = """\
  evermind-pack export runs/shakespeare -o shakespeare/
  evermind-pack export model.safetensors -o model.zip --dtype bf16
  evermind-pack export peer.moe0 -o peer/ --dtype f32
  evermind-pack export peer.evl0 -o peer/ --fp16-rounding truncate
  evermind-pack export tokitai-moe:tiny -o tiny/ --seed 7
  evermind-pack export model.evermind -o model/ --dtype f32 --tokenizer vocab-folder/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, destination and how weights are stored."""
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="a training run, a folder or file with model.safetensors and config.json (the "
        "peer's Hugging Face bundle too), a peer's MoE0, EVL0, LMBC or .evermind file, a "
        "checkpoint.tkp1 with its arch.json, an Atome model's packed file with its config.json "
        "or .pt checkpoint (told apart by content), or FAMILY:PRESET for an "
        "untrained model (tokitai-moe:nano, :tiny, :medium, :full)",
    )
    add_output(parser)
    parser.add_argument(
        "--dtype",
        choices=("f16", "bf16", "f32", "ternary", "ternary2"),
        help="what expert weights are stored as (default: f16; for tilelli models ternary, "
        "which is base-3, or ternary2, two bits a weight)",
    )
    add_layout(parser)
    parser.add_argument(
        "--fp16-rounding",
        choices=("nearest", "truncate"),
        default="nearest",
        help="nearest: round expert weights to the nearest half. truncate: cut every weight, "
        "resident ones too, as the peer does; the package then computes the peer's half "
        "model (default: nearest)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        help="a peer model's tokenizer: its tokenizer.json, or a folder with that or with "
        "vocab.json and merges.txt",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, help="of an untrained preset's weights (default: 0)"
    )
    parser.add_argument("--name", help="the package's name (default: the source's)")
    parser.add_argument("--package-version", help="its version (default: the source's, or 1)")
    add_card(parser)


def run(args: argparse.Namespace) -> int:
    """Export, then say what was written."""
    try:
        from evermind_exporters import (
            ExportOptions,
            export_package,
            read_source,
            with_peer_tokenizer,
        )
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export", "Exporting") from error

    source = read_source(args.source, seed=args.seed)
    check_text(args, source.name)
    if args.tokenizer:
        source = with_peer_tokenizer(source, args.tokenizer)
    options = ExportOptions(
        dtype=args.dtype,
        rounding=args.fp16_rounding,
        layout=args.layout,
        name=args.name,
        version=args.package_version,
        card=Card(
            description=args.description,
            license=args.license,
            author=args.author,
            tags=tuple(args.tag),
            training_summary=source.card.training_summary,
        ),
        overwrite=args.force,
    )
    try:
        from ..parity import parity_reference
    except ImportError:
        reference = None
        remark(
            "note: no parity file is written, as PyTorch is not installed "
            "(pip install 'evermind-pack[train]')",
            quiet=args.quiet,
        )
    else:
        reference = parity_reference(source.family)
    silent = args.quiet or args.json
    with progress("writing experts", quiet=silent, unit="bytes") as advance:
        digest = export_package(source, args.output, options, reference=reference, progress=advance)
    print_result(args, digest)
    return 0


def print_result(
    args: argparse.Namespace,
    digest: str,
    figures: Mapping[str, Any] | None = None,
    rows: Mapping[str, str] | None = None,
) -> None:
    """Show the package at `args.output`; `figures` (as JSON) and `rows` (else) say more of it."""
    from evermind_manifests.package import open_package

    with open_package(args.output) as package:
        manifest = package.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    experts = sum(shard.bytes for shard in manifest.shards)
    if args.json:
        print_json(
            {
                "package": str(args.output),
                "digest": digest,
                "family": manifest.family,
                "experts": len(manifest.shards),
                "expert_bytes": experts,
                "bytes": size,
                "parity": manifest.parity is not None,
                **(figures or {}),
            }
        )
        return
    print_table(
        {
            "package": f"{args.output}  ({human_bytes(size)})",
            "family": manifest.family,
            "experts": f"{counted(len(manifest.shards), 'shard')}, {human_bytes(experts)}",
            **(rows or {}),
            "digest": digest,
        }
    )


def check_text(args: argparse.Namespace, source_name: str) -> None:
    """Refuse bytes that are no UTF-8: they cannot be written to a manifest."""
    texts = {
        "--name": args.name or source_name,
        "--package-version": getattr(args, "package_version", None) or "",
        "--license": args.license or "",
        "--author": args.author or "",
        "--description": args.description,
        "--tag": "".join(args.tag),
    }
    for option, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{option}: expected Unicode text, found {text!r}") from error
