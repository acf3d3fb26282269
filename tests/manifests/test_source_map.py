"""source.json: what it says is held against the tensors that a package has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_manifests.errors import ManifestError
from evermind_manifests.manifest import Manifest
from evermind_manifests.package import open_package
from evermind_manifests.safetensors_header import TensorRange
from evermind_manifests.source_map import (
    SOURCE_FORMAT,
    ShardPart,
    SourceFile,
    SourceMap,
    SourceTensor,
    Span,
    encode_source,
    parse_source,
    source_problems,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.manifests.builders import write_tiny


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    write_tiny(tmp_path / "p")
    with open_package(tmp_path / "p") as package:
        return package.manifest


def source(manifest: Manifest) -> tuple[SourceMap, dict[str, TensorRange]]:
    """A map with a tensor of every kind, for the experts of the tiny package's first layer."""
    layer = manifest.layers[0]
    spec = next(one for one in manifest.kinds[layer.kind].tensors if len(one.shape) == 2)
    rows, width = spec.shape
    stacked = tuple(
        ShardPart(layer=0, expert=expert, tensor=spec.name, at=(Span(expert, expert + 1),))
        for expert in range(layer.experts)
    )
    woven = tuple(
        ShardPart(
            layer=0,
            expert=expert,
            tensor=spec.name,
            at=(Span(0, width), Span(expert, layer.experts * rows, layer.experts)),
            transposed=True,
        )
        for expert in range(layer.experts)
    )
    tensors = {
        "head": SourceTensor(dtype="bf16", shape=(4, 3), resident=("head",)),
        "rows": SourceTensor(dtype="f32", shape=(6, 3), resident=("head", "tail")),
        "stacked": SourceTensor(dtype="f16", shape=(layer.experts, rows, width), shards=stacked),
        "woven": SourceTensor(dtype="f16", shape=(width, layer.experts * rows), shards=woven),
        "unused": SourceTensor(dtype="f16", shape=(2,), kept=True),
        "lost": SourceTensor(dtype="f16", shape=(0, 2)),
    }
    made = SourceMap(
        format=SOURCE_FORMAT,
        files={"model.safetensors": SourceFile(tensors=tuple(tensors), metadata={"format": "pt"})},
        tensors=tensors,
        kept="source.safetensors",
    )
    return made, {
        "head": TensorRange("bf16", (4, 3), 0, 24),
        "tail": TensorRange("bf16", (2, 3), 24, 36),
    }


KEPT = {"unused": TensorRange("f16", (2,), 0, 4)}


def test_a_map_is_read_as_it_was_written(manifest: Manifest) -> None:
    made, resident = source(manifest)
    assert parse_source(encode_source(made)) == made
    assert list(source_problems(made, manifest, resident, KEPT)) == []


def test_spans_are_slices() -> None:
    span = Span(1, 8, 3)
    assert np.arange(9)[span.slice].tolist() == [1, 4, 7]
    assert len(span) == 3


spans = st.builds(Span, st.integers(0, 20), st.integers(1, 24), st.integers(1, 7))


@given(spans, spans)
def test_spans_meet_where_an_index_is_in_both(one: Span, other: Span) -> None:
    indices = (set(range(span.begin, span.end, span.step)) for span in (one, other))
    assert one.meets(other) == bool(set.intersection(*indices))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["files"]["model.safetensors"]["tensors"].pop(), "exactly one of them"),
        (lambda raw: raw.pop("kept"), "expected a file where tensors are kept"),
        (lambda raw: raw["tensors"]["head"].update(resident=["neck"]), "no tensor 'neck'"),
        (lambda raw: raw["tensors"]["rows"].update(shape=[7, 3]), r"found \[6, 3\]"),
        (lambda raw: raw["tensors"]["rows"].update(shape=[6, 4]), r"rows of \[6, 4\]"),
        (lambda raw: raw["tensors"]["head"].update(shape=[3, 4]), r"shape: expected \[3, 4\]"),
        (lambda raw: raw["tensors"]["head"].update(kept=True), "one place, found 2"),
        (lambda raw: raw["tensors"]["unused"].update(dtype="f32"), "expected f32"),
        (lambda raw: raw["tensors"]["stacked"]["shards"].pop(), "expected all of"),
        (
            lambda raw: raw["tensors"]["stacked"]["shards"][1].update(at=[[0, 1]]),
            "each value in one part, found some in layer 0 expert 0 .* and in layer 0 expert 1",
        ),
        (
            lambda raw: raw["tensors"]["woven"]["shards"][1]["at"][1].__setitem__(0, 0),
            "each value in one part",
        ),
        (lambda raw: raw["tensors"]["stacked"]["shards"][0].update(expert=99), "has no tensor"),
        (lambda raw: raw["tensors"]["stacked"]["shards"][0].update(layer=99), "has no tensor"),
        (lambda raw: raw["tensors"]["stacked"]["shards"][0].pop("at"), "expected a slice"),
        (lambda raw: raw["tensors"]["stacked"]["shards"][0].update(at=[[9, 10]]), "a slice"),
    ],
)
def test_what_does_not_fit_is_told(
    manifest: Manifest, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    made, resident = source(manifest)
    raw = json.loads(encode_source(made))
    change(raw)
    found = list(source_problems(parse_source(json.dumps(raw).encode()), manifest, resident, KEPT))
    assert len(found) == 1
    assert re.search(message, found[0])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": "evermind.source/2", "files": {}, "tensors": {}}',
        '{"format": "evermind.source/1", "files": {}, "files": {}, "tensors": {}}',
        '{"format": "evermind.source/1", "files": {}, "tensors": {"a": {"dtype": "f8"}}}',
    ],
)
def test_what_is_no_map_is_refused(text: str) -> None:
    with pytest.raises(ManifestError):
        parse_source(text.encode())
