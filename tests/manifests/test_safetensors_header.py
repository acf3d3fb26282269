"""The strict header reader: what the library writes is read, anything odd is refused."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from evermind_manifests.errors import IntegrityError, TruncatedError
from evermind_manifests.safetensors_header import read_header
from hypothesis import given
from hypothesis import strategies as st


def file(header: Any, data: int = 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> Any:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_the_library_writes() -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.int64),
        "h": np.ones(5, np.float16),
        "bf": np.ones(2, ml_dtypes.bfloat16),
        "scalar": np.float32(7),
        "flag": np.array([True]),
    }
    data = safetensors.numpy.save({k: np.asarray(v) for k, v in arrays.items()}, {"who": "me"})
    found = read_header(data)
    assert {name: found[name].dtype for name in arrays} == {
        "b": "f32", "a": "i64", "h": "f16", "bf": "bf16", "scalar": "f32", "flag": "bool",
    }  # fmt: skip
    for name, array in arrays.items():
        tensor = found[name]
        assert tensor.shape == array.shape
        assert data[tensor.begin : tensor.end] == array.tobytes()
    head = data[: min(tensor.begin for tensor in found.values())]
    assert read_header(head, size=len(data)) == found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (file({"a": entry(0, 8), "b": entry(4, 16)}), "'b': expected to begin at"),
        (file({"a": entry(0, 4), "b": entry(8, 16)}), "'b': expected to begin at"),
        (file({"a": entry(4, 16)}), "'a': expected to begin at"),
        (file({"a": entry(0, 12)}), "the tensors end at"),
        (file({"a": entry(0, 20)}), "the tensors end at"),
        (file({"a": entry(0, 16, [5])}), "expected 20 bytes, found 16"),
        (file({"a": entry(0, 16, [2**31 - 1] * 8)}), "bytes, found 16"),
        (file({"a": entry(16, 0, [1])}), "expected 4 bytes, found -16"),
        (file({"a": entry(-16, 0)}), "Expected `int` >= 0"),
        (file({"a": entry(0, 2**60, [1])}), "Expected `int` <= 9007199254740991"),
        (file({"a": entry(0, 16, dtype="F8_E4M3")}), "unknown dtype 'F8_E4M3'"),
        (file({"a": entry(0, 16) | {"more": 1}}), "unknown field"),
        (file({"__metadata__": {"x": 1}, "a": entry(0, 16)}), "Expected `str`, got `int`"),
        (file(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{}}'), "stands twice"),
        (file(b'{"a":' + b"[" * 100_000), "header: "),
        (file(b'["a"]'), "expected a JSON object"),
        (file(b" {}"), "expected a JSON object"),
        (file(b"{\xff}"), "header: "),
        (file({}, data=1), "the tensors end at"),
    ],
)
def test_headers_that_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(IntegrityError, match=message) as caught:
        read_header(data, "resident")
    assert str(caught.value).startswith("resident: ")


@pytest.mark.parametrize(
    "data", [b"", b"1234567", struct.pack("<Q", 100) + b"{}", file({"a": entry(0, 16)})[:30]]
)
def test_short_files(data: bytes) -> None:
    with pytest.raises(TruncatedError):
        read_header(data)


def test_a_header_that_is_too_long_is_not_read() -> None:
    with pytest.raises(IntegrityError, match="expected at most 16,777,216 bytes"):
        read_header(struct.pack("<Q", 2**63), size=2**64)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for prefix in (b"", struct.pack("<Q", len(data))):
        with suppress(IntegrityError):
            read_header(prefix + data)
