"""The golden cases of tests/fixtures/families: one JSON file and one safetensors file each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

FAMILY_CASES = Path(__file__).parent / "fixtures" / "families"
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class FamilyCase:
    """`weights`, `inputs` and `outputs` by the names behind `w/`, `in/` and `out/`."""

    config: dict[str, Any]
    expected: dict[str, Any]
    tolerance: dict[str, float]
    weights: Arrays
    inputs: Arrays
    outputs: Arrays

    def check(self, found: Mapping[str, npt.NDArray[Any]], **names: str) -> None:
        """Each found array is near the expected one: `names` maps found to expected names."""
        for name, array in found.items():
            self.close(name, array, self.outputs[names.get(name, name)])

    def close(self, name: str, found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
        if np.issubdtype(expected.dtype, np.integer):
            np.testing.assert_array_equal(found, expected, err_msg=name)
        else:
            np.testing.assert_allclose(found, expected, **self.tolerance, err_msg=name)


@cache
def family_case(name: str) -> FamilyCase:
    case = json.loads((FAMILY_CASES / f"{name}.json").read_text())
    arrays = load_file(FAMILY_CASES / f"{name}.safetensors")
    groups: dict[str, Arrays] = {"w": {}, "in": {}, "out": {}}
    for key, array in arrays.items():
        group, _, inner = key.partition("/")
        groups[group][inner] = array
    return FamilyCase(case["config"], case["expected"], case["tolerance"], *groups.values())
