"""What to compute in: what was asked for, and what the device and the package have."""

from __future__ import annotations

import json
from pathlib import Path

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import DeviceError, InputError, UnsupportedError
from evermind_manifests.manifest import Manifest, parse_manifest
from evermind_runtime.choose_compute import ComputeName, choose_compute
from evermind_runtime.parity import typical_error


def manifest_with(folder: Path, *variants: str) -> Manifest:
    raw = json.loads((folder / "manifest.json").read_bytes())
    one = {"plan": raw["plan"], "kinds": {}, "tolerance": 0.1}
    return parse_manifest(json.dumps(raw | {"variants": dict.fromkeys(variants, one)}).encode())


@pytest.mark.parametrize(
    ("asked", "variants", "device", "expected"),
    [
        ("auto", (), "cpu", "f32"),
        ("auto", ("f16", "bf16"), "cpu", "f32"),
        ("auto", (), "cuda", "f32"),
        ("auto", ("f16",), "cuda:1", "f16"),
        ("auto", ("f16", "bf16"), "cuda", "bf16"),
        ("f32", ("f16",), "cuda", "f32"),
        ("f16", ("f16", "bf16"), "cuda", "f16"),
        ("f16", ("f16",), "cpu", "f16"),
    ],
)
def test_choices(
    lm_package: Path,
    asked: ComputeName,
    variants: tuple[str, ...],
    device: str,
    expected: str,
) -> None:
    assert choose_compute(asked, manifest_with(lm_package, *variants), device) == expected


def test_what_cannot_be_had_is_refused(lm_package: Path) -> None:
    with pytest.raises(UnsupportedError, match="has programs for f32, f16 only"):
        choose_compute("bf16", manifest_with(lm_package, "f16"), "cuda")
    with pytest.raises(DeviceError, match="CPU provider has no kernels"):
        choose_compute("bf16", manifest_with(lm_package, "bf16"), "cpu")
    with pytest.raises(InputError, match="expected one of auto, f32, f16, bf16"):
        choose_compute("fp8", manifest_with(lm_package), "cpu")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="--compute both"):
        em.load(lm_package, compute="f16")


def test_a_package_without_variants_computes_in_float32(lm_package: Path) -> None:
    with em.load(lm_package) as model:
        assert model.compute == "f32"


def test_a_typical_error_leaves_few_tokens_out() -> None:
    expected = np.full((5, 3), 2.0, np.float32)
    found = expected + np.float32(0.02)
    found[4] += 1
    assert typical_error(expected, found) == pytest.approx(0.01, rel=1e-4)
    found[0, 0] = np.nan
    assert typical_error(expected, found) == float("inf")


@pytest.mark.parametrize(("rows", "wrong"), [(16, 8), (16, 5), (40, 8), (200, 8), (200, 50)])
def test_what_goes_wrong_at_the_end_is_not_outvoted(rows: int, wrong: int) -> None:
    expected = np.full((rows, 3), 2.0, np.float32)
    found = expected.copy()
    found[-wrong:] += 1
    assert typical_error(expected, found) == pytest.approx(0.25)


@pytest.mark.parametrize("begin", [0, 25, 50, 75])
def test_a_quarter_of_its_own_is_seen(begin: int) -> None:
    expected = np.full((100, 3), 2.0, np.float32)
    found = expected.copy()
    found[begin : begin + 13] += 1
    assert typical_error(expected, found) == pytest.approx(0.25)
    found[begin : begin + 3] = expected[0]
    assert typical_error(expected, found) == 0
