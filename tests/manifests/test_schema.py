"""The committed JSON Schema is the one the structs give, and it tells good from bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from evermind_manifests.errors import ManifestError
from evermind_manifests.manifest import parse_manifest
from evermind_manifests.schema import SCHEMA_PATH, render_schema

from tests.manifests.builders import write_tiny


def test_the_committed_schema_is_current() -> None:
    assert SCHEMA_PATH.read_bytes() == render_schema(), (
        "run `python -m evermind_manifests.schema` and commit the result"
    )


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    write_tiny(tmp_path / "p")
    found: dict[str, Any] = json.loads((tmp_path / "p" / "manifest.json").read_bytes())
    return found


def accepted(raw: dict[str, Any]) -> bool:
    schema = json.loads(SCHEMA_PATH.read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(raw))


def test_a_real_manifest_is_valid(raw: dict[str, Any]) -> None:
    assert accepted(raw)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("plan"),
        lambda raw: raw.update(schema="evermind.package/2"),
        lambda raw: raw.update(name=""),
        lambda raw: raw["shards"][0].update(bytes=-1),
        lambda raw: raw["shards"][0].update(bytes=1.5),
        lambda raw: raw["shards"][0].update(offset=2**53),
        lambda raw: raw["shards"][0].update(sha256="A" * 64),
        lambda raw: raw["shards"][0].pop("file"),
        lambda raw: raw["files"].update({"x.json": {"bytes": 1}}),
        lambda raw: raw["kinds"]["ffn"].update(scope="universe"),
        lambda raw: raw["kinds"]["ffn"]["tensors"][0].update(dtype="f8"),
        lambda raw: raw["kinds"]["ffn"]["tensors"][0].update(shape=[0]),
        lambda raw: raw["kinds"]["ffn"]["tensors"][0].update(shape=[1] * 17),
        lambda raw: raw["layers"][0].update(top_k=0),
        lambda raw: raw["plan"]["decode"][0].update(step="dance"),
        lambda raw: raw.update(tokenizer={"kind": "words"}),
        lambda raw: raw.update(generation={"top_p": 1.5}),
        lambda raw: raw.update(generation={"repetition_penalty": 0}),
    ],
)
def test_schema_and_parser_refuse_the_same(
    raw: dict[str, Any], change: Callable[[dict[str, Any]], Any]
) -> None:
    change(raw)
    assert not accepted(raw)
    with pytest.raises(ManifestError):
        parse_manifest(json.dumps(raw).encode())
