"""Variants of a package: one manifest for each, and every rule for it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evermind_manifests.manifest import Manifest, parse_manifest
from evermind_manifests.package import open_package
from evermind_manifests.structure import check_structure, referenced_files
from evermind_manifests.variants import computing

from tests.manifests.builders import KIND, write_tiny


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    write_tiny(tmp_path / "p")
    found: dict[str, Any] = json.loads((tmp_path / "p" / "manifest.json").read_bytes())
    variant = {"plan": found["plan"], "kinds": {KIND: "graphs/expert.onnx"}, "tolerance": 0.01}
    found["variants"] = {"f16": variant}
    return found


def parsed(raw: dict[str, Any]) -> Manifest:
    return parse_manifest(json.dumps(raw).encode())


def test_a_variant_stands_in_the_place_of_the_programs(raw: dict[str, Any]) -> None:
    raw["variants"]["f16"]["kinds"] = {KIND: "graphs/head.onnx"}
    manifest = parsed(raw)
    found = computing(manifest, "f16")
    assert found.kinds[KIND].graph == "graphs/head.onnx"
    assert found.kinds[KIND].graph_external is None
    assert found.kinds[KIND].tensors == manifest.kinds[KIND].tensors
    assert (found.plan, found.variants) == (manifest.plan, {})
    assert (found.shards, found.files) == (manifest.shards, manifest.files)


def test_a_package_computes_in_what_it_is_asked_to(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "p"
    (folder / "manifest.json").write_text(json.dumps(raw))
    with open_package(folder) as package:
        assert package.compute == "f32"
        half = package.computing("f16")
        assert (half.compute, half.digest, half.store) == ("f16", package.digest, package.store)
        assert half.read_file("graphs/head.onnx") == package.read_file("graphs/head.onnx")


def test_what_holds_for_the_plan_holds_for_a_variant(raw: dict[str, Any]) -> None:
    assert check_structure(parsed(raw)) == []
    variant = json.loads(json.dumps(raw["variants"]["f16"]))
    del variant["plan"]["decode"][0]
    variant["kinds"]["stranger"] = "graphs/nowhere.onnx"
    variant["plan"]["state"]["more"] = {"dtype": "f32", "shape": [1], "init": 0.0}
    raw["variants"] = {"bf16": variant}
    problems = check_structure(parsed(raw))
    assert problems
    assert all(one.place.startswith("variants['bf16'].") for one in problems)
    found = {(one.code, one.place.partition("].")[2]) for one in problems}
    assert ("variant", "kinds") in found
    assert ("variant", "plan.state") in found
    assert ("plan-undefined", "plan.decode[0]") in found


def test_the_graphs_of_a_variant_are_files_of_the_package(raw: dict[str, Any]) -> None:
    raw["variants"]["f16"]["kinds"] = {KIND: "graphs/nowhere.onnx"}
    manifest = parsed(raw)
    place = f"variants['f16'].kinds[{KIND!r}].graph"
    assert (place, "graphs/nowhere.onnx") in set(referenced_files(manifest))
    assert [(one.code, one.place) for one in check_structure(manifest)] == [
        ("unlisted-file", place)
    ]


@pytest.mark.parametrize(
    "change",
    [{"tolerance": 0.0}, {"tolerance": 0.11}, {"tolerance": 1.0}, {"kinds": None}, {"plan": None}],
)
def test_a_malformed_variant_is_refused(raw: dict[str, Any], change: dict[str, Any]) -> None:
    raw["variants"]["f16"] |= change
    with pytest.raises(ValueError, match="variants"):
        parsed(raw)


def test_variants_are_of_half_precision(raw: dict[str, Any]) -> None:
    raw["variants"] = {"f64": raw["variants"]["f16"]}
    with pytest.raises(ValueError, match="variants"):
        parsed(raw)


def test_bfloat16_is_for_buffers_alone(raw: dict[str, Any]) -> None:
    plan = raw["variants"]["f16"]["plan"] = json.loads(json.dumps(raw["plan"]))
    (name,) = plan["state"]
    plan["state"][name] |= {"dtype": "bf16"}
    (found,) = [one for one in check_structure(parsed(raw)) if one.code == "state-shape"]
    assert found.place == f"variants['f16'].plan.state[{name!r}]"
    assert "bf16, but this state is no buffer" in found.message
