"""The streamed safetensors file is the library's, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from evermind_exporters.resident import Stored, TensorFile, pack_resident
from evermind_manifests.errors import ExportError
from evermind_manifests.safetensors_header import read_header
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

_DTYPES = [np.dtype(one) for one in ("<f4", "<f2", "<f8", "<i8", "<i4", "u1", "?")]


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, npt.NDArray[Any]]:
    names = draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=6))
    made = {}
    for name in names:
        dtype = draw(st.sampled_from(_DTYPES))
        shape = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
        made[name] = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    return made


@given(tensors())
def test_the_bytes_are_those_of_the_library(arrays: dict[str, npt.NDArray[Any]]) -> None:
    data, index = pack_resident(arrays)
    assert data == save(arrays)
    header = read_header(data)
    for name, place in index.items():
        assert (place.offset, place.offset + place.bytes) == header[name][2:4]
        assert data[place.offset : place.offset + place.bytes] == arrays[name].tobytes()


def test_bfloat16_lies_before_float16() -> None:
    import ml_dtypes

    arrays = {"a": np.ones(2, np.float16), "b": np.ones(3, ml_dtypes.bfloat16)}
    file = TensorFile({"a": Stored("f16", (2,)), "b": Stored("bf16", (3,))})
    assert b"".join(file.parts(lambda name: iter([arrays[name].tobytes()]))) == save(arrays)


def test_a_tensor_of_another_length_is_refused() -> None:
    file = TensorFile({"a": Stored("f32", (2,))})
    with pytest.raises(ExportError, match="a: expected 8 bytes, found 4"):
        list(file.parts(lambda _: iter([b"1234"])))
