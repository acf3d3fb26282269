"""Storage dtypes: the peer's truncation bit for bit, IEEE rounding, and overflow."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from evermind_manifests.dtypes import count_nonfinite, decode, encode, tensor_bytes
from evermind_manifests.errors import ExportError, ShardError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.conftest import GoldenCase

BITS = hnp.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1))


def test_truncated_halves_are_the_peers(golden: Callable[[str], GoldenCase]) -> None:
    case = golden("fp16")
    values = case.array("encode_in.f32")
    expected = case.array("encode_out.u16", "<u2")
    # What the peer turns from finite to infinite is refused here; see the next test.
    kept = ~(np.isfinite(values) & (np.abs(values) >= 65536))
    assert 0 < np.count_nonzero(~kept) < 1500
    stored = encode(values[kept], "f16", "truncate")
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored.view(np.uint16), expected[kept])


def test_decoding_halves_is_the_peers(golden: Callable[[str], GoldenCase]) -> None:
    case = golden("fp16")
    found = decode(case.bytes("decode_in.u16"), "f16", (3500,))
    np.testing.assert_array_equal(
        found.view(np.uint32), case.array("decode_out.f32").view(np.uint32)
    )


def test_nearest_halves_are_numpys_around_every_half_and_tie() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    exact = np.concatenate([halves, ties, np.float32([65519, 1e-8, 1e-38, 1e-45])])
    bits = exact.view(np.uint32)
    around = np.concatenate([bits, bits + 1, bits[bits > 0] - 1]).view(np.float32)
    values = np.concatenate([around, -around])
    values = values[np.abs(values) < 65520]
    assert len(values) > 3 * 65536  # several blocks
    found = encode(values, "f16").view(np.uint16)
    np.testing.assert_array_equal(found, values.astype(np.float16).view(np.uint16))
    hostile = np.concatenate([values, np.float32([np.inf, -np.inf, np.nan])])
    found = encode(hostile, "f16").view(np.uint16)
    np.testing.assert_array_equal(found, hostile.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize(
    ("dtype", "rounding", "largest", "too_large"),
    [
        ("f16", "nearest", 65519.0, 65520.0),
        ("f16", "truncate", 65535.9, 65536.0),
        ("bf16", "nearest", 3.3895e38, 3.4e38),
    ],
)
def test_a_finite_value_never_becomes_an_infinity(
    dtype: str, rounding: str, largest: float, too_large: float
) -> None:
    assert np.isfinite(decode(encode(np.float32([largest]), dtype, rounding), dtype, (1,))).all()
    with pytest.raises(ExportError, match=r"2 of 3 finite values do not fit .*magnitude"):
        encode(np.float32([1.0, -too_large, too_large]), dtype, rounding)
    for value in (np.inf, -np.inf, np.nan):
        assert not np.isfinite(decode(encode(np.float32([value]), dtype, rounding), dtype, (1,)))


@given(BITS)
def test_nearest_is_ieee(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    for dtype, kind in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        with np.errstate(all="ignore"):
            expected = values.astype(kind).astype(np.float32)
        if (np.isinf(expected) & np.isfinite(values)).any():
            with pytest.raises(ExportError):
                encode(values, dtype)
            continue
        found = decode(encode(values, dtype), dtype, values.shape)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(values))


@given(BITS, st.sampled_from(["f16", "bf16", "f32"]), st.sampled_from(["nearest", "truncate"]))
def test_encoding_twice_changes_nothing(bits: np.ndarray, dtype: str, rounding: str) -> None:
    values = bits.view(np.float32)
    try:
        stored = encode(values, dtype, rounding)
    except ExportError:
        return
    decoded = decode(stored, dtype, values.shape)
    again = encode(decoded, dtype, rounding)
    np.testing.assert_array_equal(stored.view(np.uint8), again.view(np.uint8))
    # Truncation never grows a value.
    if rounding == "truncate":
        finite = np.isfinite(values)
        assert (np.abs(decoded[finite]) <= np.abs(values[finite])).all()


def test_counting_what_is_not_finite() -> None:
    values = np.float32([0.0, np.inf, 1.0, np.nan, -np.inf])
    for dtype in ("f16", "bf16", "f32"):
        assert count_nonfinite(encode(values, dtype), dtype) == 3
    assert count_nonfinite(np.arange(8, dtype=np.int64), "i64") == 0


def test_a_buffer_of_another_length_is_refused() -> None:
    with pytest.raises(ShardError, match=r"f16 tensor \[2, 3\]: expected 12 bytes, found 10"):
        decode(bytes(10), "f16", (2, 3))


def test_only_float32_is_encoded() -> None:
    with pytest.raises(ExportError, match="expected a float32 array, found float64"):
        encode(np.zeros(3), "f16")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="cannot be stored as i64"):
        encode(np.zeros(3, np.float32), "i64")


def test_lengths_do_not_overflow() -> None:
    assert tensor_bytes("f32", (2**31 - 1,) * 4) == 4 * (2**31 - 1) ** 4
