"""Packages made by hand, with plans and graphs that no exporter writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_manifests.manifest import SCHEMA, Kind, Manifest, Parameters, Plan, parse_manifest
from evermind_manifests.shard import ShardLayout, encode_shard
from evermind_manifests.structure import check_structure
from evermind_manifests.validate import validate
from evermind_manifests.writer import PackageWriter

#: (layer, expert), its layout and its tensors.
Shard = tuple[tuple[int, int], ShardLayout, Mapping[str, np.ndarray]]


def manifest_of(plan: Plan, **more: Any) -> Manifest:
    """A manifest of a family that nobody knows, without experts unless `more` has them."""
    fields: dict[str, Any] = {
        "name": "hand-made",
        "version": "1",
        "family": "nobody-knows-it",
        "config": {},
        "parameters": Parameters(total=1, active=1),
        "files": {},
        "kinds": {},
        "layers": (),
        "shards": (),
    }
    return Manifest(schema=SCHEMA, plan=plan, **(fields | more))


def kind_of(layout: ShardLayout, graph: str, **more: Any) -> Kind:
    return Kind(graph=graph, tensors=layout.tensors, bytes=layout.bytes, **more)


def write_package(
    path: Path, manifest: Manifest, files: Mapping[str, bytes], shards: Iterable[Shard] = ()
) -> Path:
    with PackageWriter(path) as writer:
        for name, data in files.items():
            writer.add_file(name, data)
        for place, layout, arrays in shards:
            writer.add_shard(*place, encode_shard(layout, *place, arrays))
        writer.finish(manifest)
    return path


def append_rows(b: GraphBuilder, buffer: str, past: str, x: str) -> str:
    """`buffer` `(1, C, D)` with the rows of `x` `(T, D)` behind its first `past`."""
    count = b.op("Shape", x, start=0, end=1)
    start, end = b.op("Squeeze", past), b.op("Squeeze", b.op("Add", past, count))
    places = b.op("Unsqueeze", b.op("Range", start, end, b.const(1)), b.const([1]))
    places = b.op("Concat", b.op("Mul", places, b.const(0)), places, axis=1)
    return str(b.op("ScatterND", buffer, places, x))


def zero_unless_large(b: GraphBuilder, x: str) -> str:
    """A 0 to add; making it fails where a number of `x` is 1000 or more."""
    first = b.op("Cast", b.op("ReduceMax", x, keepdims=0), to=7)
    beyond = b.op("Div", first, b.const(1000))
    return str(b.op("Gather", b.const([0], np.float32), b.op("Min", beyond, b.const(9))))


def problems_after(package: Path, change: Callable[[Any], None]) -> list[str]:
    """What the structure of a sound package's manifest, changed so, is found wrong with."""
    assert validate(package, deep=True).ok
    raw = json.loads((package / "manifest.json").read_bytes())
    change(raw)
    return [one.message for one in check_structure(parse_manifest(json.dumps(raw).encode()))]
