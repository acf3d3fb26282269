"""Hostile manifests: each is refused with a message, in bounded time and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from evermind_manifests import open_package
from evermind_manifests.errors import (
    EvermindPackError,
    ManifestError,
    UnsupportedError,
)
from evermind_manifests.manifest import MAX_MANIFEST_BYTES, parse_manifest
from evermind_manifests.validate import validate
from hypothesis import given
from hypothesis import strategies as st

from tests.manifests.builders import edit_manifest, write_tiny

DEEP = 200_000


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "p")
    return tmp_path / "p"


def valid_bytes(package: Path) -> bytes:
    return (package / "manifest.json").read_bytes()


def refuse(package: Path, message: str) -> EvermindPackError:
    """Opening fails with the message, and the validator reports rather than raises."""
    with pytest.raises(EvermindPackError) as caught:
        open_package(package)
    assert message in str(caught.value), str(caught.value)
    report = validate(package, deep=True)
    assert not report.ok
    assert report.render()
    return caught.value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"name":"tiny"', b'"name":"tiny","name":"other"', "the key 'name' stands twice"),
        (b'"config":{', b'"config":{"a":{"b":1,"b":2},', "the key 'b' stands twice"),
        (b'"config":{', b'"config":{"a":NaN,', "invalid character"),
        (b'"config":{', b'"config":{"a":1e999,', "out of range"),
        (b'"config":{', b'"config":{"a":-Infinity,', "invalid"),
        (b'"config":{', b'"config":{"a":' + b"9" * 10_000 + b",", "out of range"),
        (b'"total":500', b'"total":9007199254740992', "Expected `int` <= 9007199254740991"),
        (b'"total":500', b'"total":-1', "Expected `int` >= 0"),
        (b'"total":500', b'"total":500.0', "Expected `int`, got `float`"),
        (b'"total":500', b'"total":true', "Expected `int`, got `bool`"),
        (b'"name":"tiny"', b'"name":"\\ud800"', "manifest.json: "),
        (b'"name":"tiny"', b'"name":"\xff"', "manifest.json: "),
        (b'"name":"tiny"', b'"name":null', "Expected `str`, got `null`"),
        (b'"name":"tiny"', b'"name":"' + b"x" * 300 + b'"', "length <= 256"),
    ],
)
def test_hostile_values(package: Path, old: bytes, new: bytes, message: str) -> None:
    data = valid_bytes(package)
    assert old in data
    (package / "manifest.json").write_bytes(data.replace(old, new, 1))
    assert isinstance(refuse(package, message), ManifestError)


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-32"),
        lambda text: text.encode() + b"{}",
        lambda text: text.encode()[:-2],
        lambda text: b"",
        lambda text: b"null",
        lambda text: b"[]",
    ],
)
def test_other_encodings(package: Path, encode: Callable[[str], bytes]) -> None:
    text = valid_bytes(package).decode()
    (package / "manifest.json").write_bytes(encode(text))
    refuse(package, "manifest.json: ")


@pytest.mark.parametrize("bomb", [b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP])
def test_nesting_bombs(package: Path, bomb: bytes) -> None:
    (package / "manifest.json").write_bytes(bomb)
    refuse(package, "manifest.json: ")
    data = valid_bytes_of_bomb(bomb)
    with pytest.raises(ManifestError):
        parse_manifest(data)


def valid_bytes_of_bomb(bomb: bytes) -> bytes:
    return b'{"schema":"evermind.package/1","requires":[],"config":' + bomb + b"}"


def test_a_huge_manifest_is_not_read(package: Path) -> None:
    size = 100 * 1024 * 1024
    with (package / "manifest.json").open("r+b") as file:
        file.truncate(size)
    error = refuse(package, f"expected at most {MAX_MANIFEST_BYTES:,} bytes, found {size:,}")
    assert isinstance(error, ManifestError)
    with pytest.raises(ManifestError, match="expected at most"):
        parse_manifest(bytes(MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "evermind.package/2"}, "schema: expected 'evermind.package/1', found"),
        ({"schema": "x" * 10_000}, "schema: expected"),
        ({"requires": ["future-feature"]}, "does not know 'future-feature'"),
    ],
)
def test_what_this_version_does_not_know(
    package: Path, change: dict[str, Any], message: str
) -> None:
    edit_manifest(package, lambda raw: raw.update(change))
    error = refuse(package, message)
    assert isinstance(error, UnsupportedError)
    assert len(str(error)) < 1000
    # Decided before the rest is looked at: a later schema may have other fields.
    edit_manifest(package, lambda raw: raw.update(change, plan={"new": 1}))
    refuse(package, message)


PATHS = [
    ("../outside.json", "the part '..'"),
    ("graphs/../../outside.json", "the part '..'"),
    ("/etc/passwd", "absolute"),
    ("C:\\windows\\system.json", "is not portable"),
    ("graphs\\x.onnx", "is not portable"),
    ("\\\\server\\share.json", "is not portable"),
    ("nul.json", "device name"),
    ("a\u0000.json", "is not portable"),
    ("trailing./x.json", "ends with a dot"),
    ("u\u0308.json", "normal form C"),
    ("evil.so", "do not belong in a package"),
    ("Graphs/Head.onnx", "letter case only"),
]


@pytest.mark.parametrize(("path", "message"), PATHS)
def test_hostile_paths(package: Path, path: str, message: str) -> None:
    entry = {"bytes": 0, "sha256": "0" * 64}
    edit_manifest(package, lambda raw: raw["files"].update({path: entry}))
    error = refuse(package, message)
    assert "files[" in str(error)
    # Nor can such a path be read through a package that was opened without it.
    if message != "letter case only":
        edit_manifest(package, lambda raw: raw["files"].pop(path))
        with open_package(package) as opened, pytest.raises(EvermindPackError):
            opened.store.read(path, limit=1 << 20)


@pytest.mark.parametrize(
    "digest", ["", "0" * 63, "g" * 64, "A" * 64, "sha256:" + "0" * 57, "0" * 64 + "\n"]
)
def test_hostile_digests(package: Path, digest: str) -> None:
    edit_manifest(package, lambda raw: raw["shards"][0].update(sha256=digest))
    refuse(package, "Expected `str` ")


@given(st.data())
def test_a_damaged_manifest_never_crashes(data: st.DataObject) -> None:
    raw = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    with suppress(ManifestError):
        parse_manifest(bytes(raw))


VALID = json.dumps(
    {
        "schema": "evermind.package/1",
        "name": "n",
        "version": "1",
        "family": "f",
        "config": {"a": [1, {"b": None}]},
        "parameters": {"total": 1, "active": 1},
        "files": {"a.onnx": {"bytes": 1, "sha256": "0" * 64}},
        "kinds": {},
        "layers": [],
        "shards": [],
        "plan": {
            "inputs": {"x": {"dtype": "f32", "shape": ["T", 1]}},
            "outputs": {},
            "state": {},
            "prefill": [{"step": "graph", "graph": "a.onnx", "inputs": {}, "outputs": {}}],
            "decode": [],
        },
    }
).encode()


LARGEST = 2**31 - 1


def change_layers(raw: dict[str, Any], **values: Any) -> None:
    for layer in raw["layers"]:
        layer.update(values)


def repeat_fused_step(raw: dict[str, Any]) -> None:
    raw["plan"]["decode"] += [raw["plan"]["decode"][1]] * 100


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: change_layers(raw, top_k=LARGEST), "top_k 2147483647 experts of 4 tensors"),
        (
            lambda raw: change_layers(raw, top_k=LARGEST, experts=LARGEST),
            "top_k 2147483647 experts of 4 tensors are bound, the graph has 10 inputs",
        ),
        (
            lambda raw: [
                change_layers(raw, top_k=LARGEST, experts=LARGEST),
                raw["kinds"]["ffn"].update(tensors=[]),
            ],
            "tensors: there are none",
        ),
        (lambda raw: change_layers(raw, layer=LARGEST), "layer 2147483647: stands 2 times"),
        (lambda raw: change_layers(raw, top_k=3), "top_k 3 experts of 4 tensors are bound"),
        (
            lambda raw: raw["plan"]["inputs"]["x"].update(shape=[LARGEST] * 16),
            "found f32 [2147483647, ",
        ),
        (
            lambda raw: raw["plan"]["state"]["state"].update(shape=[LARGEST] * 16),
            "state-too-large",
        ),
        (
            lambda raw: raw["kinds"]["ffn"]["tensors"][0].update(shape=[LARGEST] * 16),
            "kind-layout",
        ),
    ],
)
def test_numbers_are_not_counted_to(
    package: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """A loop that runs as often as the manifest says would not end within the time limit."""
    edit_manifest(package, change)
    report = validate(package, deep=True)
    assert not report.ok
    assert message in report.render()


def test_the_inputs_of_all_steps_are_limited(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps cost a few bytes each, and their graphs' inputs nothing in the manifest."""
    monkeypatch.setattr("evermind_manifests.interface.MAX_STEP_INPUTS", 100)
    edit_manifest(package, repeat_fused_step)
    report = validate(package, deep=True)
    found = [item for item in report.errors if item.code == "graph-interface"]
    assert [(item.place, item.message) for item in found] == [
        ("plan.decode[13]", "over 100 inputs up to here")
    ]
