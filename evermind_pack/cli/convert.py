"""`evermind-pack convert`."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from evermind_manifests.destination import check_outside_packages
from evermind_manifests.errors import (
    ConfigError,
    ExportError,
    InputError,
    MissingExtraError,
)
from evermind_manifests.package import Package, open_package

from .targets import check_targets
from .terminal import counted, human_bytes, print_json, print_table, progress

EXAMPLES = """\
  evermind-pack convert shakespeare/ -o shakespeare.evermind --to evermind
  evermind-pack convert layer/ -o layer.moe0 --to moe0 --f32
  evermind-pack convert shakespeare/ -o model.evl0 --to evl0 --fp16 --fp16-rounding truncate
  evermind-pack convert shakespeare/ -o shakespeare-hf/ --to hf
  evermind-pack convert olmoe/ -o OLMoE-1B-7B/ --to hf     # the imported checkpoint, bit by bit"""

_TARGETS = ("moe0", "evl0", "lmbc", "evermind", "safetensors", "gguf", "hf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The package, the file to write, its format and precision."""
    parser.add_argument("package", metavar="PKG", help="a package folder or .zip file")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="the file to write, or the folder for --to hf",
    )
    parser.add_argument(
        "--to",
        choices=_TARGETS,
        required=True,
        help="the peer's format: moe0 (a lone MoE layer), evl0 (a language model), lmbc (limbic), "
        "evermind (either of the first two with its manifest), safetensors and gguf (exports of a "
        "language model), hf (a new folder: safetensors, its config.json and the tokenizer; of an "
        "imported package the checkpoint that it was made of)",
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="write half precision")
    precision.add_argument(
        "--f32",
        action="store_true",
        help="write float32 (default: half if the package's experts are f16, else float32)",
    )
    parser.add_argument(
        "--fp16-rounding",
        choices=("nearest", "truncate"),
        default="nearest",
        help="how float32 weights become half; truncate gives the peer's own bytes "
        "(default: nearest)",
    )
    parser.add_argument(
        "--no-trailer",
        action="store_true",
        help="leave out the CRC after an EVL0 checkpoint, as the peer did before 2026.6.34",
    )
    parser.add_argument(
        "--lossy",
        action="store_true",
        help="write an imported checkpoint back although the import rounded it",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    """Convert, then say what was written."""
    if args.no_trailer and args.to not in ("evl0", "evermind"):
        raise InputError(f"--no-trailer has no meaning with --to {args.to}")
    if args.to == "hf":
        if args.force:
            raise InputError("--force has no meaning with --to hf: a folder is never replaced")
    elif not args.force and os.path.lexists(args.output):
        raise ExportError(
            f"{args.output}: exists already",
            hint="Choose another name, or give --force.",
        )
    if args.to == "hf":
        check_outside_packages(args.output)
    else:
        check_targets(args.output, sources=(args.package,))
    try:
        from evermind_exporters import (
            convert_package,
            convert_to_bundle,
            write_file,
            write_folder,
        )
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export", "Converting") from error

    half = True if args.fp16 else False if args.f32 else None
    rounding = args.fp16_rounding
    with open_package(args.package) as package:
        family = package.manifest.family
        imported = family.startswith("huggingface/")
        if imported and args.to == "hf":
            _restore(args, package)
            return 0
        if imported:
            raise ConfigError(
                f"{args.package}: a {family!r} model cannot be written as {args.to}",
                hint="It fits: hf.",
            )
        if args.lossy:
            raise InputError("--lossy has no meaning but for imported packages, with --to hf")
        if args.to == "hf":
            files = convert_to_bundle(package, half=half, rounding=rounding)
        else:
            trailer = not args.no_trailer
            data = convert_package(package, args.to, half=half, rounding=rounding, trailer=trailer)
            files = {args.output.name: data}
    if args.to == "hf":
        write_folder(args.output, files)
    else:
        write_file(args.output, files[args.output.name], overwrite=args.force)
    _print_result(args, family, files)
    return 0


def _restore(args: argparse.Namespace, package: Package) -> None:
    """Write the checkpoint that a package was imported from, and say what differs."""
    from evermind_exporters.huggingface.restore import restore_checkpoint

    if args.fp16 or args.f32 or args.fp16_rounding != "nearest":
        raise InputError(
            f"{args.package}: an imported checkpoint is written as it was: --fp16, --f32 and "
            "--fp16-rounding have no meaning"
        )
    with progress("writing tensors", quiet=args.quiet or args.json, unit="bytes") as advance:
        done = restore_checkpoint(package, args.output, lossy=args.lossy, progress=advance)
    size = sum(one.bytes for one in done.files.values())
    files = counted(len(done.files), "file")
    if args.json:
        print_json(
            {
                "output": str(args.output),
                "format": args.to,
                "family": package.manifest.family,
                "bytes": size,
                "sha256": {name: one.sha256 for name, one in done.files.items()},
                "tensors": done.tensors,
                "lossless": not done.rounded,
                "rounded": list(done.rounded),
            }
        )
        return
    if args.quiet:
        return
    told = "bit by bit those of the checkpoint"
    if done.rounded:
        told = f"of which {len(done.rounded):,} are as the import rounded them"
    print_table(
        {
            "written": f"{args.output}  ({human_bytes(size)} in {files})",
            "family": package.manifest.family,
            "tensors": f"{done.tensors:,}, {told}",
        }
    )


def _print_result(args: argparse.Namespace, family: str, files: Mapping[str, bytes]) -> None:
    size = sum(map(len, files.values()))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if args.json:
        print_json(
            {
                "output": str(args.output),
                "format": args.to,
                "family": family,
                "bytes": size,
                "sha256": digests,
            }
        )
    elif not args.quiet:
        rows = {"written": f"{args.output}  ({human_bytes(size)})", "format": args.to}
        print_table(rows | {"family": family} | digests)
