"""The exporter's seam, with a family that uses what the three Evermind families do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evermind_runtime
import numpy as np
import pytest
from evermind_exporters import ExportOptions, ModelSource, export_package, read_source
from evermind_exporters.blueprint import Blueprint, Tensors
from evermind_exporters.config_fields import ConfigFields
from evermind_exporters.families import FAMILIES
from evermind_exporters.families.kind import expert_kind
from evermind_exporters.families.linear import Weight
from evermind_exporters.family import Arrays, Config, ModelFamily, ModularFamily, Shape, Shapes
from evermind_exporters.onnx_graph import ExternalTensor, GraphBuilder
from evermind_manifests.errors import CheckpointError, ConfigError
from evermind_manifests.manifest import DType, ExpertsStep, GraphStep, Layer, Plan, ValueSpec
from evermind_manifests.package import open_package
from evermind_manifests.shard import plan_shard
from evermind_manifests.validate import validate
from evermind_runtime.parity import parity_problems
from safetensors.numpy import save_file

WIDTH = 6


class Signs(ModelFamily):
    """One expert `y = scale * sign(w) x` that sees the whole sequence; signs stored as bytes."""

    name = "signs"

    def resolve(self, raw: Config, found: Shapes) -> dict[str, Any]:
        fields = ConfigFields(self.name, raw)
        width = fields.integer("width", WIDTH)
        fields.finish()
        return {"width": width}

    def recognises(self, found: Shapes) -> bool:
        return "sign.w" in found

    def shapes(self, config: Config) -> dict[str, Shape]:
        return {"sign.w": (config["width"], config["width"])}

    def resident_names(self, config: Config) -> list[str]:
        return []

    def computed_resident(self, config: Config, tensors: Tensors) -> Arrays:
        return {"zero": np.array([[0]], np.int64)}

    def computed_shard(self, config: Config, tensors: Tensors, layer: int, expert: int) -> Arrays:
        w = tensors["sign.w"]
        return {
            "codes": (w > 0).astype(np.uint8),
            "scale": np.array([np.abs(w).mean()])[:].astype("f4"),
        }

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        rng = np.random.default_rng(seed)
        return {"x": rng.normal(size=(5, config["width"])).astype(np.float32)}

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        d = config["width"]

        def expert(b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
            two, one = b.const(2, np.float32), b.const(1, np.float32)
            signs = b.op("Sub", b.op("Mul", b.cast(weights["codes"].value, "f32"), two), one)
            return str(b.op("Mul", b.op("Gemm", x, signs, transB=1), weights["scale"].value))

        layout = plan_shard("signs", "none", [("codes", "u8", (d, d)), ("scale", "f32", (1,))])
        b = GraphBuilder("route", resident)
        x = b.input("x", "f32", ["T", d])
        rows = b.op("Slice", b.op("Shape", x), b.const([0]), b.const([1]))
        shape = b.op("Concat", rows, b.const([1]), axis=0)
        ids = b.op("Expand", b.weight("zero"), shape)
        b.output(ids, "ids", "i64", ["T", 1])
        b.output(b.cast(b.op("Equal", ids, ids), "f32"), "gates", "f32", ["T", 1])
        steps = (
            GraphStep(graph="graphs/r.onnx", inputs={"x": "x"}, outputs={"ids": "i", "gates": "g"}),
            ExpertsStep(layer=0, x="x", ids="i", gates="g", y="y"),
        )
        value = ValueSpec(dtype="f32", shape=("T", d))
        return Blueprint(
            kinds={"signs": expert_kind(layout, (d, d), expert, scope="sequence")},
            layers=(Layer(layer=0, kind="signs", experts=1, top_k=1),),
            graphs={"graphs/r.onnx": b.build()},
            plan=Plan(
                inputs={"x": value}, outputs={"y": value}, state={}, prefill=steps, decode=steps
            ),
            active_parameters=d * d,
        )


class Scale(Signs):
    """`y = w x` elementwise: no experts at all."""

    name = "scale"

    def recognises(self, found: Shapes) -> bool:
        return "scale.w" in found

    def shapes(self, config: Config) -> dict[str, Shape]:
        return {"scale.w": (config["width"],)}

    def resident_names(self, config: Config) -> list[str]:
        return ["scale.w"]

    def computed_resident(self, config: Config, tensors: Tensors) -> Arrays:
        return {}

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        d = config["width"]
        b = GraphBuilder("scale", resident)
        b.output(
            b.op("Mul", b.input("x", "f32", ["T", d]), b.weight("scale.w")), "y", "f32", ["T", d]
        )
        steps = (GraphStep(graph="graphs/s.onnx", inputs={"x": "x"}, outputs={"y": "y"}),)
        value = ValueSpec(dtype="f32", shape=("T", d))
        plan = Plan(
            inputs={"x": value}, outputs={"y": value}, state={}, prefill=steps, decode=steps
        )
        return Blueprint({}, (), {"graphs/s.onnx": b.build()}, plan, d)


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", ModularFamily("toy", {"signs": Signs(), "scale": Scale()}))


def _folder(path: Path, config: Mapping[str, Any], **tensors: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    named = {name.replace("_", "."): array for name, array in tensors.items()}
    save_file(named, path / "model.safetensors")
    return path


W = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32)


def _reference(config: Config, tensors: Tensors) -> Any:
    # As the family says, the reference gets the weights its shard's tensors were made of.
    w = tensors["sign.w"].astype(np.float64)
    assert np.array_equal(w, W)
    return lambda inputs: {"y": np.abs(w).mean() * inputs["x"] @ np.where(w > 0, 1, -1).T}


@pytest.mark.parametrize("config", [{"family": "toy", "module": "signs"}, {"family": "toy"}, {}])
def test_packed_codes_and_a_sequence_scope(tmp_path: Path, config: dict[str, Any]) -> None:
    source = read_source(_folder(tmp_path / "m", config, sign_w=W))
    assert source.config == {"module": "signs", "width": WIDTH}
    export_package(source, tmp_path / "p", ExportOptions(), reference=_reference)
    assert not validate(tmp_path / "p", deep=True, run=parity_problems).problems
    with open_package(tmp_path / "p") as package:
        assert package.manifest.kinds["signs"].scope == "sequence"
        assert [spec.dtype for spec in package.manifest.kinds["signs"].tensors] == ["u8", "f32"]
    with evermind_runtime.load(tmp_path / "p", budget="1MiB") as model:
        x = np.ones((3, WIDTH), np.float32)
        expected = np.abs(W).mean() * x @ np.where(W > 0, 1, -1).T
        for steps in ("prefill", "decode"):
            np.testing.assert_allclose(model.forward({"x": x}, steps=steps)["y"], expected, 1e-5)


def test_a_module_without_experts(tmp_path: Path) -> None:
    source = read_source(_folder(tmp_path / "m", {"family": "toy"}, scale_w=W[0]))
    assert source.config["module"] == "scale"
    export_package(source, tmp_path / "p")
    with evermind_runtime.load(tmp_path / "p") as model:
        found = model.forward({"x": np.ones((2, WIDTH), np.float32)})["y"]
    assert np.array_equal(found, np.stack([W[0], W[0]]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"module": "sings"}, "toy config: module: expected one of signs, scale, found 'sings'"),
        ({"module": ["signs"]}, "module: expected one of"),
        ({}, "module: .*found none, and the tensors are those of none: a, b"),
        ({"module": "signs", "width": 0}, "signs config: width: expected an integer from 1 to"),
        ({"module": "signs", "widht": 4}, "signs config: unknown fields: widht"),
    ],
)
def test_a_module_or_field_that_cannot_be(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = _folder(tmp_path / "m", {"family": "toy", **config}, a=W, b=W)
    with pytest.raises(ConfigError, match=message):
        read_source(folder)


def test_tensors_of_two_families_tell_none(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m", {}, sign_w=W, win=W, aLogit=W)
    with pytest.raises(CheckpointError, match="the tensors of limbic and toy: aLogit"):
        read_source(folder)


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m", {"family": "shared-expert-moe"}, wr=W, router_weight=W)
    with pytest.raises(CheckpointError, match=r"router\.weight and wr are the same|wr and router"):
        read_source(folder)


def test_a_shards_tensors_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    """In the order of the layout, and never the next before the last was taken."""
    from tests.packages import lm_source

    source = lm_source()
    asked: list[str] = []

    class Lazy(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            asked.append(name)
            return source.tensors[name]

        def __iter__(self) -> Any:
            return iter(source.tensors)

        def __len__(self) -> int:
            return len(source.tensors)

    lazy = ModelSource(source.family, source.config, Lazy(), "lazy")
    export_package(lazy, tmp_path / "p")
    resident = FAMILIES[source.family].resident_names(source.config)
    experts = [name for name in source.tensors if ".experts." in name]
    assert asked == [*resident, *experts]
