"""Shards: what is written is read back, and all shards of a kind have one layout."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from evermind_manifests.dtypes import STORAGE
from evermind_manifests.errors import ExportError, ShardError
from evermind_manifests.manifest import Kind, Shard
from evermind_manifests.shard import (
    check_shard,
    encode_shard,
    plan_shard,
    read_header,
    read_shard,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.manifests.builders import KIND, tiny_arrays, tiny_layout, tiny_shard

ORDINALS = st.one_of(
    st.integers(0, 2**32 - 1), st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1])
)
TENSORS = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=20),
        st.sampled_from(sorted(STORAGE)),
        st.lists(st.integers(1, 7), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda tensor: tensor[0],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(TENSORS, ORDINALS, ORDINALS, st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_round_trip(tensors: Any, layer: int, expert: int, extra: dict[str, Any]) -> None:
    layout = plan_shard("kind", "relu", tensors, extra)
    rng = np.random.default_rng(0)
    arrays = {
        name: np.frombuffer(
            rng.integers(0, 2, STORAGE[dtype].itemsize * int(np.prod(shape)), np.uint8),
            STORAGE[dtype],
        ).reshape(shape)
        for name, dtype, shape in tensors
    }
    data = encode_shard(layout, layer, expert, arrays)
    assert len(data) == layout.bytes
    assert len(data) % 64 == 0
    contents = read_shard(data, "shard")
    header = contents.header
    assert (header.layer, header.expert, header.kind) == (layer, expert, "kind")
    assert header.tensors == layout.tensors
    assert header.extra == extra
    for spec in layout.tensors:
        assert spec.offset % 64 == 0
        assert bytes(contents.views[spec.name]) == arrays[spec.name].tobytes()
    # The widest numbers do not move a tensor.
    assert encode_shard(layout, 0, 0, arrays)[layout.data_offset :] == data[layout.data_offset :]


def test_the_head_is_as_specified() -> None:
    data = tiny_shard(1, 2)
    magic, version, length, first = struct.unpack_from("<4I", data)
    assert (magic, version) == (0x4D6F4530, 3)
    assert first == tiny_layout().tensors[0].offset
    assert first % 64 == 0
    assert data[:4] == b"0EoM"
    assert not any(data[16 + length : first])


def test_arrays_decode_to_their_values() -> None:
    arrays = tiny_arrays(1, 2)
    contents = read_shard(tiny_shard(1, 2), "shard")
    for name, array in arrays.items():
        np.testing.assert_array_equal(contents.array(name), array.astype(np.float32))


def test_equal_content_gives_equal_bytes() -> None:
    tensors = [("w", "f32", (2,))]
    one = plan_shard("k", "relu", tensors, {"a": {"x": 1, "y": 2}, "b": 3})
    other = plan_shard("k", "relu", tensors, {"b": 3, "a": {"y": 2, "x": 1}})
    arrays = {"w": np.float32([1, 2])}
    assert encode_shard(one, 0, 0, arrays) == encode_shard(other, 0, 0, arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": np.zeros((8, 4), np.float32)}, r"tensor w1: expected f16 \[8, 4\], found float32"),
        ({"b1": np.zeros((4, 2), np.float32)}, r"tensor b1: expected f32 \[8\], found float32"),
        ({"b1": np.zeros(8, ">f4")}, "tensor b1: expected f32"),
        ({"w9": np.zeros(1, np.float32)}, "expected tensors .* found .*w9"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        encode_shard(tiny_layout(), 0, 0, tiny_arrays(0, 0) | change)


@pytest.mark.parametrize(
    ("tensors", "extra"),
    [
        ([], None),
        ([("w", "f32", (1,)), ("w", "f32", (2,))], None),
        ([("w", "f32", (1,))], {"key": b"bytes"}),
        ([("w", "f32", (1,))], {"key": "x" * (1 << 20)}),
        ([(f"w{i}" * 60, "f32", (1,)) for i in range(9000)], None),
    ],
)
def test_layouts_that_cannot_be_are_refused(tensors: Any, extra: Any) -> None:
    with pytest.raises(ExportError):
        plan_shard("kind", "relu", tensors, extra)


def test_a_shard_is_compared_with_the_manifest() -> None:
    layout = tiny_layout()
    kind = Kind(graph="graphs/expert.onnx", tensors=layout.tensors, bytes=layout.bytes)
    data = tiny_shard(1, 2)
    contents = read_shard(data, "shard")

    def shard(layer: int, expert: int) -> Shard:
        return Shard(
            layer=layer, expert=expert, file="f.moe0", offset=0, bytes=len(data), sha256="0" * 64
        )

    check_shard(contents, kind, shard(1, 2), "shard", kind_name=KIND)
    check_shard(read_header(data, len(data), "shard"), kind, shard(1, 2), "shard")
    with pytest.raises(ShardError, match="expected layer 1 expert 1, found layer 1 expert 2"):
        check_shard(contents, kind, shard(1, 1), "shard")
    with pytest.raises(ShardError, match="kind: expected 'other', found 'ffn'"):
        check_shard(contents, kind, shard(1, 2), "shard", kind_name="other")
    fewer = Kind(graph="graphs/expert.onnx", tensors=layout.tensors[:3], bytes=layout.bytes)
    with pytest.raises(ShardError, match="tensors: expected 3, found 4"):
        check_shard(contents, fewer, shard(1, 2), "shard")
    other = plan_shard("ffn", "relu", [("w1", "f32", (8, 4)), ("b1", "f32", (8,))])
    changed = Kind(graph="graphs/expert.onnx", tensors=other.tensors, bytes=other.bytes)
    with pytest.raises(ShardError, match=r"tensor w1: expected f32 \[8, 4\] at .*found w1 f16"):
        check_shard(contents, changed, shard(1, 2), "shard")
