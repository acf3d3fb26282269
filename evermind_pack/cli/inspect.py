"""`evermind-pack inspect`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from evermind_manifests.manifest import Manifest
from evermind_manifests.package import Package
from evermind_runtime.budget import token_cycle_bytes, total_expert_bytes, working_set_bytes
from evermind_runtime.openers import open_location
from evermind_runtime.sizes import state_sizes

from .remote import add_remote_arguments, remote_options
from .terminal import counted, human_bytes, print_json, print_table, state_text

EXAMPLES = """\
  evermind-pack inspect shakespeare/
  evermind-pack inspect shakespeare/ --json
  evermind-pack inspect shakespeare/ --shards
  evermind-pack inspect model.evermind"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The package, and whether to list every shard."""
    parser.add_argument(
        "package", metavar="PKG", help="a package (folder, .zip, URL), or a peer's model file"
    )
    parser.add_argument("--shards", action="store_true", help="list every shard too")
    add_remote_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the summary. Only the manifest is read; of a peer's file, all of it."""
    with open_location(args.package, remote_options(args)) as package:
        summary = summarize(package)
        manifest = package.manifest
    if args.json:
        if args.shards:
            summary["shards"] = [
                {field: getattr(shard, field) for field in shard.__struct_fields__}
                for shard in manifest.shards
            ]
        print_json(summary)
        return 0
    _print(summary, manifest)
    if args.shards:
        print()
        for shard in manifest.shards:
            print(
                f"{shard.layer:>4} {shard.expert:>5}  {shard.file} "
                f"+{shard.offset} {shard.bytes}  {shard.sha256}"
            )
    return 0


def summarize(package: Package) -> dict[str, Any]:
    """What the manifest says, as plain values; sizes in bytes."""
    manifest = package.manifest
    resident = manifest.files[manifest.resident].bytes if manifest.resident else 0
    return {
        "name": manifest.name,
        "version": manifest.version,
        "family": manifest.family,
        "digest": package.digest,
        "config": manifest.config,
        "parameters": {
            "total": manifest.parameters.total,
            "active": manifest.parameters.active,
        },
        "layers": len(manifest.layers),
        "experts": len(manifest.shards),
        "files": len(manifest.files),
        "bytes": {
            "package": sum(entry.bytes for entry in manifest.files.values()),
            "resident": resident,
            "experts": total_expert_bytes(manifest),
        },
        "state": asdict(state_sizes(manifest.plan.state.values())),
        "kinds": {
            name: {
                "bytes": kind.bytes,
                "scope": kind.scope,
                "tensors": {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in kind.tensors},
            }
            for name, kind in manifest.kinds.items()
        },
        "budget": {
            "least": working_set_bytes(manifest),
            "token_cycle": token_cycle_bytes(manifest),
            "all_resident": total_expert_bytes(manifest),
        },
        "tokenizer": manifest.tokenizer.kind if manifest.tokenizer else None,
        "parity": manifest.parity is not None,
        "inputs": {name: f"{v.dtype} {list(v.shape)}" for name, v in manifest.plan.inputs.items()},
        "outputs": {
            name: f"{v.dtype} {list(v.shape)}" for name, v in manifest.plan.outputs.items()
        },
    }


def _print(summary: dict[str, Any], manifest: Manifest) -> None:
    parameters, sizes, budget = summary["parameters"], summary["bytes"], summary["budget"]
    rows = {
        "name": f"{summary['name']} (version {summary['version']})",
        "family": summary["family"],
        "digest": summary["digest"],
        "parameters": f"{parameters['total']:,} in all, {parameters['active']:,} per token",
        "package": f"{human_bytes(sizes['package'])} in {counted(summary['files'], 'file')}",
        "resident": human_bytes(sizes["resident"]),
        "state": f"{state_text(state_sizes(manifest.plan.state.values()))}, of each sequence",
        "experts": f"{human_bytes(sizes['experts'])} in {counted(summary['experts'], 'shard')}",
    }
    for name, kind in summary["kinds"].items():
        tensors = ", ".join(f"{tensor} {what}" for tensor, what in kind["tensors"].items())
        rows[f"kind {name}"] = f"{human_bytes(kind['bytes'])} each: {tensors}"
    for group, layers in _layer_groups(manifest).items():
        rows[f"layers {layers}"] = group
    rows["inputs"] = ", ".join(
        f"{name} {one.dtype} ({', '.join(map(str, one.shape))})"
        for name, one in manifest.plan.inputs.items()
    )
    rows["tokenizer"] = summary["tokenizer"] or "none"
    if manifest.layers:
        rows["budget, least"] = f"{human_bytes(budget['least'])}: one layer's routed experts"
        rows["budget, cycle"] = (
            f"{human_bytes(budget['token_cycle'])}: what one token passes through"
        )
        rows["budget, all"] = f"{human_bytes(budget['all_resident'])}: nothing is ever evicted"
    print_table(rows)


def _layer_groups(manifest: Manifest) -> dict[str, str]:
    """`"16 experts, top-2, kind"` → `"0-3"`: layers that are alike stand together."""
    groups: dict[str, list[int]] = {}
    for layer in manifest.layers:
        what = f"{counted(layer.experts, 'expert')}, top-{layer.top_k}, {layer.kind}"
        groups.setdefault(what, []).append(layer.layer)
    return {
        what: str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        for what, numbers in groups.items()
    }
