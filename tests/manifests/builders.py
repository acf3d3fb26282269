"""A tiny package that is valid in every respect, and ways to damage it.

Two MoE layers of three experts (4 -> 8 -> 4, top-2), a recurrent state, resident weights
bound both as external data and as graph inputs, and fused experts in decode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import safetensors.numpy
from evermind_manifests.dtypes import encode
from evermind_manifests.manifest import (
    Card,
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Kind,
    Layer,
    Manifest,
    Parameters,
    Plan,
    StateSpec,
    Tokenizer,
    ValueSpec,
)
from evermind_manifests.safetensors_header import read_header
from evermind_manifests.shard import ShardLayout, encode_shard, plan_shard
from evermind_manifests.writer import PackageWriter
from onnx import TensorProto, helper

D, H, EXPERTS, LAYERS, TOP_K = 4, 8, 3, 2, 2
KIND = "ffn"


def tiny_layout() -> ShardLayout:
    return plan_shard(
        KIND,
        "relu",
        [("w1", "f16", (H, D)), ("b1", "f32", (H,)), ("w2", "f16", (D, H)), ("b2", "f32", (D,))],
        extra={"source": "test"},
    )


def tiny_arrays(layer: int, expert: int) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng([layer, expert])
    values = {spec.name: rng.normal(size=spec.shape) for spec in tiny_layout().tensors}
    return {
        spec.name: encode(values[spec.name].astype(np.float32), spec.dtype)
        for spec in tiny_layout().tensors
    }


def tiny_shard(layer: int, expert: int) -> bytes:
    return encode_shard(tiny_layout(), layer, expert, tiny_arrays(layer, expert))


def tiny_resident() -> bytes:
    rng = np.random.default_rng(7)
    return safetensors.numpy.save(
        {
            "router.0": rng.normal(size=(EXPERTS, D)).astype(np.float32),
            "router.1": rng.normal(size=(EXPERTS, D)).astype(np.float32),
            "scale": np.full((D,), 0.5, np.float32),
        }
    )


def tiny_graphs() -> dict[str, bytes]:
    """Every graph of the package by path."""
    return {
        "graphs/expert.onnx": _model(
            ["x"], ["y"], _ffn("x", "", "y"), tensors=_tensor_inputs(""), rows="n"
        ),
        "graphs/expert_external.onnx": _model(
            ["x"], ["y"], _ffn("x", "", "y"), external=_shard_initializers(), rows="n"
        ),
        "graphs/router.onnx": _router_graph(),
        "graphs/head.onnx": _head_graph(),
        "graphs/segment.onnx": _segment_graph(),
    }


def tiny_manifest() -> Manifest:
    layout = tiny_layout()
    route = {
        layer: GraphStep(
            graph="graphs/router.onnx",
            inputs={"x": "x" if layer == 0 else "h.0"},
            outputs={"ids": f"ids.{layer}", "gates": f"gates.{layer}"},
            weights={"router": f"router.{layer}"},
        )
        for layer in range(LAYERS)
    }
    experts = {
        layer: ExpertsStep(
            layer=layer,
            x="x" if layer == 0 else "h.0",
            ids=f"ids.{layer}",
            gates=f"gates.{layer}",
            y=f"h.{layer}",
        )
        for layer in range(LAYERS)
    }
    head = GraphStep(
        graph="graphs/head.onnx",
        inputs={"h": "h.1", "state": "state"},
        outputs={"y": "y", "next": "state"},
    )
    segment = GraphStep(
        graph="graphs/segment.onnx",
        inputs={"x": "x", "gates": "gates.0"},
        outputs={"y": "h.0"},
        experts=FusedExperts(layer=0, ids="ids.0"),
    )
    return Manifest(
        schema="evermind.package/1",
        name="tiny",
        version="1",
        family="shared-expert-moe",
        config={"modelDim": D, "hiddenDim": H, "numExperts": EXPERTS, "topK": TOP_K},
        parameters=Parameters(total=500, active=300),
        files={},
        kinds={
            KIND: Kind(
                graph="graphs/expert.onnx",
                graph_external="graphs/expert_external.onnx",
                tensors=layout.tensors,
                bytes=layout.bytes,
            )
        },
        layers=tuple(
            Layer(layer=layer, kind=KIND, experts=EXPERTS, top_k=TOP_K) for layer in range(LAYERS)
        ),
        shards=(),
        plan=Plan(
            inputs={"x": ValueSpec(dtype="f32", shape=("T", D))},
            outputs={"y": ValueSpec(dtype="f32", shape=("T", D))},
            state={"state": StateSpec(dtype="f32", shape=(D,))},
            prefill=(route[0], experts[0], route[1], experts[1], head),
            decode=(route[0], segment, route[1], experts[1], head),
        ),
        resident="graphs/resident.safetensors",
        tokenizer=Tokenizer(kind="bytes"),
        parity="parity.json",
        card=Card(description="A test.", license="apache-2.0"),
    )


def write_tiny(
    destination: Path,
    *,
    layout: Literal["files", "pool"] = "files",
    overwrite: bool = False,
    manifest: Manifest | None = None,
    graphs: dict[str, bytes] | None = None,
    shard: Callable[[int, int], bytes] = tiny_shard,
    writer_type: type[PackageWriter] = PackageWriter,
) -> str:
    """Write the package; gives its digest. `graphs` replaces some of the graphs."""
    with writer_type(destination, layout=layout, overwrite=overwrite) as writer:
        for path, data in (tiny_graphs() | (graphs or {})).items():
            writer.add_file(path, data)
        writer.add_file("graphs/resident.safetensors", tiny_resident())
        writer.add_file("parity.json", b'{"cases": []}\n')
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                writer.add_shard(layer, expert, shard(layer, expert))
        return writer.finish(manifest or tiny_manifest())


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a package folder as raw JSON, whatever that leads to."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw))


def replace_file(folder: Path, path: str, data: bytes) -> None:
    """Replace a file and correct what the manifest says of it: damage that digests miss."""
    (folder / path).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()

    def change(raw: dict[str, Any]) -> None:
        raw["files"][path] = {"bytes": len(data), "sha256": digest}
        for shard in raw["shards"]:
            if shard["file"] == path:
                shard["sha256"] = digest

    edit_manifest(folder, change)


def external_tensor(
    name: str, dims: list[int], location: str, offset: int, length: int, dtype: int = 1
) -> onnx.TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_type=dtype, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _model(
    inputs: list[str],
    outputs: list[str],
    nodes: list[onnx.NodeProto],
    *,
    tensors: list[onnx.ValueInfoProto] | None = None,
    external: list[onnx.TensorProto] | None = None,
    rows: str | int = "T",
) -> bytes:
    def value(name: str) -> onnx.ValueInfoProto:
        if name in ("state", "next"):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [D])
        if name in ("ids", "gates"):
            kind = TensorProto.INT64 if name == "ids" else TensorProto.FLOAT
            return helper.make_tensor_value_info(name, kind, [rows, TOP_K])
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, D])

    graph = helper.make_graph(
        nodes,
        "tiny",
        [value(name) for name in inputs] + (tensors or []),
        [value(name) for name in outputs],
        initializer=external or [],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="test"
    )
    return bytes(model.SerializeToString(deterministic=True))


def _ffn(x: str, prefix: str, y: str) -> list[onnx.NodeProto]:
    def name(tensor: str) -> str:
        return f"{prefix}{tensor}"

    return [
        helper.make_node("Cast", [name("w1")], [name("w1_f32")], to=TensorProto.FLOAT),
        helper.make_node("Gemm", [x, name("w1_f32"), name("b1")], [name("pre")], transB=1),
        helper.make_node("Relu", [name("pre")], [name("hidden")]),
        helper.make_node("Cast", [name("w2")], [name("w2_f32")], to=TensorProto.FLOAT),
        helper.make_node("Gemm", [name("hidden"), name("w2_f32"), name("b2")], [y], transB=1),
    ]


def _tensor_inputs(prefix: str) -> list[onnx.ValueInfoProto]:
    kinds = {"f16": TensorProto.FLOAT16, "f32": TensorProto.FLOAT}
    return [
        helper.make_tensor_value_info(f"{prefix}{spec.name}", kinds[spec.dtype], list(spec.shape))
        for spec in tiny_layout().tensors
    ]


def _shard_initializers() -> list[onnx.TensorProto]:
    kinds = {"f16": TensorProto.FLOAT16, "f32": TensorProto.FLOAT}
    return [
        external_tensor(
            spec.name, list(spec.shape), "expert.bin", spec.offset, spec.bytes, kinds[spec.dtype]
        )
        for spec in tiny_layout().tensors
    ]


def _router_graph() -> bytes:
    top_k = helper.make_tensor("k", TensorProto.INT64, [1], [TOP_K])
    return _model(
        ["x"],
        ["ids", "gates"],
        [
            helper.make_node("Gemm", ["x", "router"], ["logits"], transB=1),
            helper.make_node("TopK", ["logits", "k"], ["values", "ids"]),
            helper.make_node("Softmax", ["values"], ["gates"]),
        ],
        tensors=[helper.make_tensor_value_info("router", TensorProto.FLOAT, [EXPERTS, D])],
        external=[top_k],
    )


def _head_graph() -> bytes:
    data = tiny_resident()
    scale = read_header(data)["scale"]
    begin, end = scale.begin, scale.end
    last = helper.make_tensor("last", TensorProto.INT64, [], [-1])
    return _model(
        ["h", "state"],
        ["y", "next"],
        [
            helper.make_node("Mul", ["h", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "state"], ["y"]),
            helper.make_node("Gather", ["y", "last"], ["next"], axis=0),
        ],
        external=[external_tensor("scale", [D], "resident.safetensors", begin, end - begin), last],
    )


def _segment_graph() -> bytes:
    nodes: list[onnx.NodeProto] = []
    for i in range(TOP_K):
        nodes += _ffn("x", f"expert{i}.", f"y{i}")
    index = [helper.make_tensor(f"i{i}", TensorProto.INT64, [1], [i]) for i in range(TOP_K)]
    nodes += [helper.make_node("Gather", ["gates", f"i{i}"], [f"g{i}"], axis=1) for i in (0, 1)]
    nodes += [helper.make_node("Mul", [f"y{i}", f"g{i}"], [f"gy{i}"]) for i in (0, 1)]
    nodes.append(helper.make_node("Add", ["gy0", "gy1"], ["y"]))
    tensors = [value for i in range(TOP_K) for value in _tensor_inputs(f"expert{i}.")]
    return _model(["x", "gates"], ["y"], nodes, tensors=tensors, external=index, rows=1)
