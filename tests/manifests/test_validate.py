"""The validator: every code it can report is provoked here, alone and with place and remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_manifests.manifest import Manifest, parse_manifest
from evermind_manifests.problems import CODES, Problem, problem
from evermind_manifests.shard import encode_shard
from evermind_manifests.structure import check_structure
from evermind_manifests.validate import Report, validate

from tests.manifests.builders import (
    edit_manifest,
    external_tensor,
    replace_file,
    tiny_arrays,
    tiny_graphs,
    tiny_layout,
    tiny_resident,
    write_tiny,
)

Change = Callable[[Path], None]


def edit(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda folder: edit_manifest(folder, change)


def shard_of(raw: dict[str, Any], layer: int, expert: int) -> dict[str, Any]:
    found: dict[str, Any] = next(
        shard for shard in raw["shards"] if (shard["layer"], shard["expert"]) == (layer, expert)
    )
    return found


def remove(path: str) -> Change:
    return lambda folder: (folder / path).unlink()


def flip(path: str, position: int) -> Change:
    def change(folder: Path) -> None:
        data = bytearray((folder / path).read_bytes())
        data[position] ^= 1
        (folder / path).write_bytes(data)

    return change


def add_file(path: str, raw: dict[str, Any]) -> None:
    raw["files"][path] = {"bytes": 0, "sha256": "0" * 64}


def swap_graphs(folder: Path) -> None:
    replace_file(folder, "graphs/head.onnx", tiny_graphs()["graphs/router.onnx"])


def external_elsewhere(folder: Path) -> None:
    import onnx

    model = onnx.load_from_string((folder / "graphs/head.onnx").read_bytes())
    model.graph.initializer[0].CopyFrom(external_tensor("scale", [4], "../../../etc/passwd", 0, 16))
    replace_file(folder, "graphs/head.onnx", model.SerializeToString())


def forbidden_operator(folder: Path) -> None:
    import onnx

    model = onnx.load_from_string((folder / "graphs/head.onnx").read_bytes())
    model.graph.node[0].domain = "com.microsoft"
    model.graph.node[0].op_type = "EPContext"
    replace_file(folder, "graphs/head.onnx", model.SerializeToString())


def infinite_weights(folder: Path) -> None:
    arrays = tiny_arrays(0, 0)
    arrays["b1"][3] = np.inf
    replace_file(folder, SHARD, encode_shard(tiny_layout(), 0, 0, arrays))


def swap_shards(folder: Path) -> None:
    one, other = folder / "experts/l000/e0000.moe0", folder / "experts/l000/e0001.moe0"
    first, second = one.read_bytes(), other.read_bytes()
    replace_file(folder, "experts/l000/e0000.moe0", second)
    replace_file(folder, "experts/l000/e0001.moe0", first)


def misleading_source(folder: Path) -> None:
    def name(raw: dict[str, Any]) -> None:
        raw["source"] = "source.json"
        add_file("source.json", raw)

    edit_manifest(folder, name)
    tensor = {"dtype": "f32", "shape": [4], "resident": ["nowhere"]}
    source = {
        "format": "evermind.source/1",
        "files": {"model.safetensors": {"tensors": ["w"]}},
        "tensors": {"w": tensor},
    }
    (folder / "source.json").write_bytes(b"")
    replace_file(folder, "source.json", json.dumps(source).encode())


SHARD = "experts/l000/e0000.moe0"
HUGE_STATE = {"dtype": "f32", "shape": [2**20, 2**20], "init": 0.0}


# code: (how to damage the package, a place it is reported at, part of the message)
def another_function(raw: dict[str, Any]) -> None:
    plan = json.loads(json.dumps(raw["plan"]))
    plan["outputs"] = dict(list(plan["outputs"].items())[:-1])
    raw["variants"] = {"bf16": {"plan": plan, "kinds": {}, "tolerance": 0.1}}


CASES: dict[str, tuple[Change, str, str]] = {
    "manifest-invalid": (
        edit(lambda raw: raw.update(version=3)),
        "version",
        "Expected `str`, got `int`",
    ),
    "manifest-unsupported": (
        edit(lambda raw: raw.update(requires=["teleport"])),
        "manifest.json",
        "'teleport'",
    ),
    "unknown-key": (
        edit(lambda raw: raw["plan"]["decode"][0].update(extra=1)),
        "plan.decode[0]",
        "unknown key 'extra'",
    ),
    "bad-path": (edit(lambda raw: add_file("../x.json", raw)), "files['../x.json']", "'..'"),
    "file-kind": (edit(lambda raw: add_file("run.py", raw)), "files['run.py']", "'.py'"),
    "path-collision": (
        edit(lambda raw: add_file("PARITY.json", raw)),
        "files['PARITY.json']",
        "letter case",
    ),
    "unlisted-file": (
        edit(lambda raw: raw["files"].pop("graphs/head.onnx")),
        "plan.decode[4].graph",
        "is not in `files`",
    ),
    "kind-layout": (
        edit(lambda raw: raw["kinds"]["ffn"]["tensors"][1].update(offset=250)),
        "kinds['ffn']",
        "offset 250 is not a multiple of 64",
    ),
    "layer-invalid": (edit(lambda raw: raw["layers"][1].update(top_k=4)), "layers[1]", "top_k 4"),
    "shard-missing": (
        edit(lambda raw: raw["shards"].pop(4)),
        "shards: layer 1",
        "1 of 3 experts have no shard: expert 1",
    ),
    "shard-surplus": (
        edit(lambda raw: shard_of(raw, 1, 2).update(expert=1)),
        "shards[5]",
        "stands in shards[4] too",
    ),
    "shard-range": (
        edit(lambda raw: shard_of(raw, 0, 0).update(offset=64)),
        "shards[0]",
        "ends at 512",
    ),
    "shard-size": (
        edit(lambda raw: shard_of(raw, 0, 0).update(bytes=384)),
        "shards[0]",
        "expected 448 bytes, found 384",
    ),
    "digest-conflict": (
        edit(lambda raw: shard_of(raw, 0, 0).update(sha256="a" * 64)),
        "shards[0]",
        "sha256 aaaa",
    ),
    "plan-undefined": (
        edit(lambda raw: raw["plan"]["prefill"][0]["inputs"].update(x="nowhere")),
        "plan.prefill[0]",
        "'nowhere' is read before it is produced",
    ),
    "plan-redefined": (
        edit(lambda raw: raw["plan"]["prefill"][1].update(y="ids.0")),
        "plan.prefill[1]",
        "'ids.0' is produced twice",
    ),
    "plan-output": (
        edit(lambda raw: raw["plan"]["outputs"].update(z={"dtype": "f32", "shape": [1]})),
        "plan.outputs['z']",
        "prefill never produces 'z'",
    ),
    "plan-experts": (
        edit(lambda raw: raw["plan"]["decode"].pop(1)),
        "plan.decode",
        "layer 0 runs 0 times",
    ),
    "plan-weights": (
        edit(lambda raw: raw.pop("resident")),
        "plan.decode[0]",
        "`resident` is not set",
    ),
    "state-shape": (
        edit(lambda raw: raw["plan"]["state"]["state"].update(shape=[4, "C"])),
        "plan.state['state']",
        "only the first dimension grows",
    ),
    "state-buffer": (
        edit(
            lambda raw: raw["plan"]["state"]["state"].update(
                shape=[4, "C"], length="past", finite="x"
            )
        ),
        "plan.state['state']",
        "finite: a buffer cannot be checked",
    ),
    "plan-pools": (
        edit(
            lambda raw: raw["plan"]["decode"][0].update(pools={"p": {"layer": 0, "tensor": "w1"}})
        ),
        "plan.decode[0]",
        "outside the pooled programs",
    ),
    "state-too-large": (
        edit(lambda raw: raw["plan"]["state"].update(state=HUGE_STATE)),
        "plan.state['state']",
        "4,398,046,511,104 bytes",
    ),
    "parameters": (
        edit(lambda raw: raw["parameters"].update(active=501)),
        "parameters",
        "active 501 > total 500",
    ),
    "variant": (edit(another_function), "variants['bf16'].plan.outputs", "are not those of"),
    "tokenizer": (
        edit(lambda raw: raw.update(tokenizer={"kind": "tokenizers"})),
        "tokenizer.file",
        "expected a path",
    ),
    "no-parity": (edit(lambda raw: raw.pop("parity")), "parity", "not set"),
    "missing-file": (remove("graphs/router.onnx"), "graphs/router.onnx", "No such file"),
    "size-mismatch": (
        lambda folder: os.truncate(folder / SHARD, 400),
        SHARD,
        "expected 448 bytes, found 400",
    ),
    "shard-header": (flip(SHARD, 0), SHARD, "magic: expected 0x4d6f4530, found 0x4d6f4531"),
    "stray-file": (
        lambda folder: (folder / "notes.txt").write_text("x") and None,
        "notes.txt",
        "is not in `files`",
    ),
    "digest-mismatch": (flip(SHARD, 300), SHARD, "sha256: expected"),
    "shard-content": (swap_shards, SHARD, "expected layer 0 expert 0, found layer 0 expert 1"),
    "resident-header": (
        lambda folder: replace_file(
            folder, "graphs/resident.safetensors", tiny_resident() + b"more"
        ),
        "graphs/resident.safetensors",
        "the tensors end at",
    ),
    "source-map": (misleading_source, "source.json", "no tensor 'nowhere'"),
    "non-finite": (infinite_weights, f"{SHARD}: tensor b1", "1 values are infinite or NaN"),
    "graph-invalid": (
        lambda folder: replace_file(folder, "graphs/head.onnx", b"not a graph"),
        "graphs/head.onnx",
        "model",
    ),
    "graph-forbidden": (forbidden_operator, "graphs/head.onnx", "com.microsoft.EPContext"),
    "graph-external": (
        external_elsewhere,
        "graphs/head.onnx: tensor 'scale'",
        "expected 'resident.safetensors', found '../../../etc/passwd'",
    ),
    "graph-interface": (
        swap_graphs,
        "plan.prefill[4] (graphs/head.onnx)",
        "the graph has no input 'h'",
    ),
}
# These need something that is not a package folder, or a level the caller brings along.
ELSEWHERE = {"not-a-package", "unreadable", "parity"}


def find(report: Report, code: str) -> list[Problem]:
    return [item for item in report.problems if item.code == code]


def test_every_code_is_provoked() -> None:
    assert set(CASES) | ELSEWHERE == set(CODES)


@pytest.mark.parametrize("code", CASES)
def test_a_problem_is_reported(tmp_path: Path, code: str) -> None:
    change, place, message = CASES[code]
    write_tiny(tmp_path / "p")
    change(tmp_path / "p")
    report = validate(tmp_path / "p", deep=True)
    found = find(report, code)
    assert any(item.place == place and message in item.message for item in found), report.render()
    for item in report.problems:
        assert item.remedy
        assert str(tmp_path) not in item.message
    info = CODES[code]
    assert report.ok == (info.severity == "warning")
    assert report.exit_code == (
        3 if any(item.integrity for item in report.errors) else 0 if report.ok else 1
    )
    # A level finds what is its own without the next one being asked for.
    shallow = validate(tmp_path / "p")
    assert bool(find(shallow, code)) == (info.level in ("structure", "files"))


@pytest.mark.parametrize(("name", "layout"), [("p", "files"), ("p", "pool"), ("p.zip", "files")])
def test_a_sound_package(tmp_path: Path, name: str, layout: Any) -> None:
    digest = write_tiny(tmp_path / name, layout=layout)
    steps: list[tuple[int, int]] = []
    report = validate(
        tmp_path / name,
        deep=True,
        run=lambda package: [],
        progress=lambda done, total: steps.append((done, total)),
    )
    assert report.problems == ()
    assert report.ok
    assert report.exit_code == 0
    assert report.digest == digest
    assert report.levels == ("structure", "files", "deep", "run")
    assert report.render().endswith("valid (checked: structure, files, deep, run)")
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] > 0
    assert json.loads(json.dumps(report.to_dict()))["problems"] == []


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p")
    codes = ["shard-size", "plan-undefined", "missing-file", "graph-forbidden", "stray-file"]
    for code in codes:
        CASES[code][0](tmp_path / "p")
    report = validate(tmp_path / "p", deep=True)
    assert set(codes) <= {item.code for item in report.problems}
    assert report.exit_code == 3
    text = report.render()
    for code in codes:
        assert f"[{code}]" in text


def test_a_broken_manifest_is_used_for_what_can_be_known(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p")

    def change(raw: dict[str, Any]) -> None:
        raw["version"] = 3
        raw["shards"][2]["sha256"] = "zz"
        raw["shards"][4]["bytes"] = -1
        raw["files"]["parity.json"]["bytes"] = "many"
        del raw["plan"]

    edit_manifest(tmp_path / "p", change)
    (tmp_path / "p" / "graphs" / "router.onnx").unlink()
    report = validate(tmp_path / "p", deep=True)
    found = {(item.code, item.place) for item in report.errors}
    assert found == {
        ("manifest-invalid", "version"),
        ("manifest-invalid", "shards[2]"),
        ("manifest-invalid", "shards[4]"),
        ("manifest-invalid", "files['parity.json']"),
        ("manifest-invalid", "plan"),
        ("missing-file", "graphs/router.onnx"),
    }
    assert report.exit_code == 3


def test_no_package_at_all(tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", tmp_path):
        report = validate(place, deep=True)
        assert len(report.problems) == 1
        assert not report.ok
        assert report.problems[0].code == "not-a-package"
        assert report.problems[0].place == str(place)


def test_the_run_level(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p")
    report = validate(tmp_path / "p", run=lambda package: [problem("parity", "case 0", "off by 1")])
    assert report.levels == ("structure", "files", "run")
    assert report.exit_code == 1
    edit_manifest(tmp_path / "p", lambda raw: raw["parameters"].update(active=501))
    report = validate(tmp_path / "p", run=lambda package: pytest.fail("must not be run"))
    assert "run" not in report.levels


def test_folders_too_deep_are_reported(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p")
    (tmp_path / "p" / "/".join(["d"] * 40)).mkdir(parents=True)
    assert find(validate(tmp_path / "p"), "unreadable")


def tiny(tmp_path: Path) -> dict[str, Any]:
    write_tiny(tmp_path / "p")
    raw: dict[str, Any] = json.loads((tmp_path / "p" / "manifest.json").read_bytes())
    return raw


def structure_of(raw: dict[str, Any]) -> list[str]:
    manifest: Manifest = parse_manifest(json.dumps(raw).encode())
    return [str(item) for item in check_structure(manifest)]


STRUCTURE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda raw: add_file("manifest.json", raw), "manifest.json cannot hold its own digest"),
    (lambda raw: add_file("experts/l000/e0000.moe0/x.json", raw), "also a folder of"),
    (lambda raw: add_file("EXPERTS/L000/e0000.moe0/x.json", raw), "also a folder of"),
    (lambda raw: raw["kinds"]["ffn"].update(bytes=450), "bytes: not a multiple of 64: 450"),
    (lambda raw: raw["kinds"]["ffn"].update(bytes=384), "the shard at 384"),
    (lambda raw: raw["kinds"]["ffn"].update(tensors=[]), "tensors: there are none"),
    (lambda raw: raw["kinds"]["ffn"]["tensors"][0].update(offset=0), "no room for a header"),
    (lambda raw: raw["kinds"]["ffn"]["tensors"][3].update(name="w1"), "the name stands twice"),
    (lambda raw: raw["kinds"]["ffn"]["tensors"].reverse(), "overlaps what ends at"),
    (
        lambda raw: raw["kinds"]["ffn"]["tensors"][0].update(dtype="f32"),
        "needs 128 bytes, found 64",
    ),
    (
        lambda raw: raw["kinds"]["ffn"]["tensors"][0].update(shape=[2**31 - 1] * 4),
        "bytes, found 64",
    ),
    (lambda raw: raw["kinds"]["ffn"].update(graph="parity.json"), "expected an .onnx file"),
    (lambda raw: raw.update(resident="parity.json"), "expected a .safetensors file"),
    (lambda raw: raw["layers"].append(raw["layers"][0]), "layer 0: stands 2 times"),
    (lambda raw: raw["layers"][0].update(kind="none"), "kind 'none' is not in `kinds`"),
    (lambda raw: raw["layers"][0].update(experts=2**31 - 1), "2147483644 of 2147483647 experts"),
    (lambda raw: raw["shards"][0].update(file="parity.json"), "expected a .moe0 or .moe0p file"),
    (lambda raw: raw["shards"][0].update(offset=32), "offset: not a multiple of 64: 32"),
    (lambda raw: raw["shards"][0].update(offset=2**53 - 1), "ends at 9007199254741439"),
    (
        lambda raw: raw["shards"][1].update(file="experts/l000/e0000.moe0"),
        "overlaps shards[0] in experts/l000/e0000.moe0",
    ),
    (lambda raw: raw["plan"]["inputs"].update(state=raw["plan"]["inputs"]["x"]), "is an input too"),
    (lambda raw: raw["plan"]["decode"][0]["outputs"].update(gates="x"), "'x' is produced twice"),
    (lambda raw: raw["plan"]["prefill"][4]["outputs"].update(next="n"), "never produces 'state'"),
    (lambda raw: raw["plan"]["prefill"][1].update(layer=7), "layer 7 is not in `layers`"),
    (lambda raw: raw["plan"]["prefill"][1].update(layer=1), "layer 1 runs 2 times"),
    (
        lambda raw: raw["plan"].update(prefill=raw["plan"]["decode"]),
        "fused experts take one token: decode only",
    ),
    (lambda raw: raw["plan"]["decode"][1]["experts"].update(ids="i"), "'i' is read before"),
    (lambda raw: raw["plan"]["outputs"]["y"].update(value="none"), "never produces 'none'"),
    (lambda raw: raw.update(tokenizer={"kind": "tokenizers", "file": "t.json"}), "'t.json' is not"),
    (
        lambda raw: raw["tokenizer"].update(chat_templates={"default": "chat.jinja"}),
        "'chat.jinja' is not",
    ),
    (
        lambda raw: raw["tokenizer"].update(chat_templates={"default": "parity.json"}),
        "expected a .jinja file",
    ),
    (lambda raw: raw["plan"]["inputs"]["x"].update(aliases=["state"]), "'state' is taken"),
    (lambda raw: raw["plan"]["inputs"]["x"].update(aliases=["z", "z"]), "'z' is taken"),
    (
        lambda raw: raw["plan"].update(observations={"y": raw["plan"]["outputs"]["y"]}),
        "is an output too",
    ),
    (
        lambda raw: raw["plan"].update(observations={"none": raw["plan"]["outputs"]["y"]}),
        "prefill never produces 'none'",
    ),
    (
        lambda raw: raw["plan"].update(routers=[ROUTER | {"probabilities": "none"}]),
        "prefill never produces 'none'",
    ),
    (
        lambda raw: raw["kinds"]["ffn"].update(graph_statistics="graphs/none.onnx"),
        "'graphs/none.onnx' is not in `files`",
    ),
]


ROUTER = {"layer": 0, "ids": "ids.0", "gates": "gates.0", "probabilities": "gates.0"}


@pytest.mark.parametrize(("change", "message"), STRUCTURE, ids=[text for _, text in STRUCTURE])
def test_structure(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    raw = tiny(tmp_path)
    assert structure_of(raw) == []
    change(raw)
    assert any(message in text for text in structure_of(raw)), structure_of(raw)


def test_pool_shards_are_page_aligned(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p", layout="pool")
    raw = json.loads((tmp_path / "p" / "manifest.json").read_bytes())
    assert structure_of(raw) == []
    raw["shards"][0]["offset"] = 64
    assert any("offset: not a multiple of 4096: 64" in text for text in structure_of(raw))


def test_an_output_may_be_called_like_an_input(tmp_path: Path) -> None:
    raw = tiny(tmp_path)
    raw["plan"]["outputs"] = {"x": raw["plan"]["outputs"]["y"] | {"value": "y"}}
    assert structure_of(raw) == []


def test_a_state_may_be_read_after_it_is_written(tmp_path: Path) -> None:
    """It means the old value, so the order of the two steps makes no difference."""
    raw = tiny(tmp_path)
    for program in ("prefill", "decode"):
        head = raw["plan"][program][4]
        again = json.loads(json.dumps(head)) | {"outputs": {"y": f"again.{program}"}}
        raw["plan"][program].append(again)
    assert structure_of(raw) == []
    raw["plan"]["decode"].append(raw["plan"]["decode"][4])
    assert any("'state' is produced twice" in text for text in structure_of(raw))


def test_an_output_may_be_taken_from_a_state(tmp_path: Path) -> None:
    raw = tiny(tmp_path)
    new = {"dtype": "f32", "shape": [4]}
    raw["plan"]["outputs"] |= {"state": new, "memory": new | {"value": "state"}}
    assert structure_of(raw) == []
    edit_manifest(tmp_path / "p", lambda old: old.update(plan=raw["plan"]))
    assert validate(tmp_path / "p", deep=True).problems == ()
    edit_manifest(tmp_path / "p", lambda old: old["plan"]["outputs"]["memory"].update(shape=[5]))
    found = find(validate(tmp_path / "p", deep=True), "graph-interface")
    assert {item.place for item in found} == {"plan.prefill: output", "plan.decode: output"}
    assert "'memory': expected f32 [5], found f32 [4]" in found[0].message


def test_what_introspection_reads_fits_the_graphs(tmp_path: Path) -> None:
    raw = tiny(tmp_path)
    spec = {"dtype": "f32", "shape": ["T", 4]}
    raw["plan"] |= {"observations": {"h": spec | {"value": "h.0"}}, "routers": [ROUTER]}
    raw["kinds"]["ffn"]["graph_statistics"] = raw["kinds"]["ffn"]["graph"]
    edit_manifest(tmp_path / "p", lambda old: old.update(plan=raw["plan"], kinds=raw["kinds"]))
    assert validate(tmp_path / "p", deep=True).problems == ()
    raw["plan"]["observations"]["h"]["shape"] = ["T", 5]
    raw["plan"]["routers"] = [ROUTER | {"ids": "gates.0"}]
    raw["kinds"]["ffn"]["graph_statistics"] = "graphs/router.onnx"
    edit_manifest(tmp_path / "p", lambda old: old.update(plan=raw["plan"], kinds=raw["kinds"]))
    found = find(validate(tmp_path / "p", deep=True), "graph-interface")
    places = {item.place.partition(" (")[0] for item in found}
    assert places == {
        "plan.prefill: observation",
        "plan.prefill: router of layer 0",
        "kinds['ffn'].graph_statistics",
    }
