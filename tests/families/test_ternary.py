"""Ternary codecs and quantisers against the golden vectors (specs/tilelli.md, 1 and 6)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from evermind_exporters.checkpoints import ternary
from evermind_manifests.errors import CheckpointError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.golden_families import FAMILY_CASES, family_case

_LAYOUTS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[int], int]]] = {
    "base3": (ternary.pack_base3, ternary.unpack_base3, ternary.base3_bytes),
    "two_bit": (ternary.pack_two_bit, ternary.unpack_two_bit, ternary.two_bit_bytes),
    "power3": (ternary.pack_power3, ternary.unpack_power3, ternary.power3_bytes),
}
_FIELDS = {"base3": "base3_5_per_byte", "two_bit": "two_bit_4_per_byte", "power3": "power3_3_bit"}


@cache
def _packing() -> Any:
    return json.loads((FAMILY_CASES / "tilelli_packing.json").read_text("utf-8"))


def _vectors(layout: str) -> list[tuple[list[int], str]]:
    packing = _packing()
    values = "power3_levels" if layout == "power3" else "trits"
    found = [(one[values], one[_FIELDS[layout]]) for one in packing["random"]]
    fixed = packing["fixed_levels" if layout == "power3" else "fixed_trits"]
    return found + [(one[values.removeprefix("power3_")], one[_FIELDS[layout]]) for one in fixed]


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_packs_the_golden_bytes(layout: str) -> None:
    pack, unpack, size = _LAYOUTS[layout]
    vectors = _vectors(layout)
    assert len(vectors) > 15
    for values, expected in vectors:
        codes = np.array(values, dtype=np.int8)
        packed = pack(codes)
        assert packed.dtype == np.uint8
        assert packed.tobytes().hex() == expected
        assert len(packed) == size(len(values))
        assert unpack(packed, len(values), "t").tolist() == values


def test_sizes() -> None:
    for count, sizes in _packing()["sizes"].items():
        for layout, (_, _, size) in _LAYOUTS.items():
            assert size(int(count)) == sizes[layout]


@pytest.mark.parametrize("layout", _LAYOUTS)
@given(data=st.data())
def test_round_trip(layout: str, data: st.DataObject) -> None:
    pack, unpack, size = _LAYOUTS[layout]
    levels = [0, 1, -1, 3, -3, 9, -9] if layout == "power3" else [-1, 0, 1]
    codes = data.draw(
        hnp.arrays(np.int8, st.integers(0, 70), elements=st.sampled_from(levels)), "codes"
    )
    packed = pack(codes)
    assert len(packed) == size(len(codes))
    np.testing.assert_array_equal(unpack(packed, len(codes), "t"), codes)


@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(1, 5), st.integers(1, 23)), elements=st.integers(-1, 1)
    )
)
def test_every_row_begins_a_byte(trits: np.ndarray) -> None:
    for layout in ("base3", "two_bit"):
        pack, unpack, size = _LAYOUTS[layout]
        packed = pack(trits)
        assert packed.shape == (len(trits), size(trits.shape[1]))
        for row, data in zip(trits, packed, strict=True):
            np.testing.assert_array_equal(unpack(data, len(row), "t"), row)


@pytest.mark.parametrize("layout", _LAYOUTS)
@given(data=st.binary(max_size=24), count=st.integers(0, 40))
def test_any_bytes_decode_to_what_packs_to_them_or_are_refused(
    layout: str, data: bytes, count: int
) -> None:
    pack, unpack, _ = _LAYOUTS[layout]
    try:
        codes = unpack(np.frombuffer(data, np.uint8), count, "t")
    except CheckpointError:
        return
    assert len(codes) == count
    assert pack(codes).tobytes() == data


@pytest.mark.parametrize(
    ("layout", "data", "count", "message"),
    [
        ("base3", "f3", 5, "at most 242, found 243"),
        ("base3", "ff", 5, "at most 242, found 255"),
        ("two_bit", "02", 4, "found 10"),
        ("power3", "070000", 8, "found 7"),
        ("base3", "7a", 6, "expected 2 packed bytes, found 1"),
        ("base3", "f2", 4, "expected zeros after the last of 4"),
        ("two_bit", "55", 3, "expected zeros after the last of 3"),
        ("power3", "499224", 7, "expected zeros after the last of 7"),
    ],
)
def test_refuses_what_stands_for_nothing(layout: str, data: str, count: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        _LAYOUTS[layout][1](np.frombuffer(bytes.fromhex(data), np.uint8), count, "w.bin")
    assert str(error.value).startswith("w.bin: ")


@pytest.mark.parametrize("name", ["w", "half", "zeros"])
def test_quantisers_match_the_reference(name: str) -> None:
    golden = family_case("tilelli_quant")
    weight = golden.inputs[name]

    def expected(what: str) -> np.ndarray:
        return golden.outputs[f"{name}/{what}"]

    def close(found: np.ndarray, what: str) -> None:
        np.testing.assert_allclose(found, expected(what), rtol=1e-6, atol=1e-7)

    close(ternary.absmean(weight), "absmean")
    one = ternary.ternarise(weight)
    np.testing.assert_array_equal(one.codes, expected("trits"))
    close(one.values(), "ternary")
    close(one.values(), "ternarize_ste")
    close(ternary.ternarise(weight, per_row=True).values(), "ternary_per_row_adapted")
    for per_row, suffix in ((False, ""), (True, "_per_row")):
        power = ternary.power_of_three(weight, per_row=per_row)
        close(power.values(), f"power3{suffix}")
        np.testing.assert_array_equal(power.codes, expected(f"power3_codes{suffix}"))


@pytest.mark.parametrize("per_row", [False, True])
@given(
    weight=hnp.arrays(
        np.float32, (3, 4), elements=st.floats(-4, 4, width=32, allow_subnormal=False)
    )
)
def test_what_was_quantised_is_recovered(per_row: bool, weight: np.ndarray) -> None:
    used = ternary.ternarise(weight, per_row=per_row)
    again = ternary.recover(used.values(), "w", per_row=per_row)
    np.testing.assert_array_equal(again.codes, used.codes)
    np.testing.assert_array_equal(again.values(), used.values())


def test_recover_keeps_small_magnitudes() -> None:
    weight = np.array([[1e-7, 0, -1e-7], [0, 0, 0]], np.float32)
    found = ternary.recover(weight, "w", per_row=True)
    np.testing.assert_array_equal(found.values(), weight)
    np.testing.assert_array_equal(found.alpha, np.float32([1e-7, 1e-5]))


def test_recover_refuses_weights_as_trained() -> None:
    with pytest.raises(CheckpointError, match="one magnitude"):
        ternary.recover(np.array([[0.5, 0.25]], np.float32), "w")
    with pytest.raises(CheckpointError, match="one magnitude"):
        ternary.recover(np.array([[np.nan, 0.0]], np.float32), "w")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_weight_that_is_not_finite_has_no_trits(bad: float, per_row: bool) -> None:
    weight = np.array([[1, 2], [3, bad]], np.float32)
    with pytest.raises(CheckpointError, match="w: expected finite numbers"):
        ternary.ternarise(weight, per_row=per_row, where="w")
    with pytest.raises(CheckpointError, match="expected finite numbers"):
        ternary.power_of_three(weight, per_row=per_row)
