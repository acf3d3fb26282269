"""What must stay finite is refused when it is not, and only then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evermind_manifests.errors import NonFiniteError
from evermind_manifests.manifest import Plan, StateSpec, ValueSpec
from evermind_runtime.finite import FiniteCheck

PLAN = Plan(
    inputs={
        "x": ValueSpec(dtype="f32", shape=("T", 2)),
        "ids": ValueSpec(dtype="i64", shape=("T",)),
    },
    outputs={
        "logits": ValueSpec(dtype="f32", shape=("T", 2), value="scores", finite="the scores"),
        "free": ValueSpec(dtype="f32", shape=("T", 2)),
    },
    state={
        "cell.10": StateSpec(dtype="f32", shape=(3,), finite="layer ten"),
        "cell.2": StateSpec(dtype="f32", shape=(3,), finite="layer two"),
        "free.0": StateSpec(dtype="f32", shape=(3,)),
    },
    prefill=(),
    decode=(),
)
GOOD = np.zeros(3, dtype=np.float32)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_the_first_layer_to_blame_is_named(bad: float) -> None:
    check = FiniteCheck(PLAN)
    wrong = np.array([1, bad, bad], dtype=np.float32)
    with pytest.raises(NonFiniteError, match=r"'cell\.2'.*found 2 of 3 .*; usually layer two"):
        check.check({"scores": wrong, "cell.10": wrong, "cell.2": wrong})
    with pytest.raises(NonFiniteError, match=r"state 'cell\.10'"):
        check.check({"scores": wrong, "cell.10": wrong, "cell.2": GOOD})
    with pytest.raises(NonFiniteError, match=r"output 'logits'.*; usually the scores"):
        check.check({"scores": wrong, "cell.2": GOOD})
    check.check({"free": wrong, "free.0": wrong})


def test_large_numbers_are_finite() -> None:
    largest = np.finfo(np.float32).max
    check = FiniteCheck(PLAN)
    check.check({"cell.2": np.full(3, largest), "cell.10": np.full(3, -largest), "scores": GOOD})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("fill", [0.0, -1.0, "largest"])
@pytest.mark.parametrize("size", [1, 8191, 8192, 8193, 20_000])
def test_one_bad_number_is_found_wherever_it_is(
    size: int, fill: float | str, dtype: type[np.floating[Any]]
) -> None:
    check = FiniteCheck(PLAN)
    number = np.finfo(dtype).max if fill == "largest" else fill
    values = np.full((1, size), number, dtype=dtype)
    check.check({"cell.2": values})
    for place in {0, size // 2, size - 1}:
        for bad in (np.inf, -np.inf, np.nan):
            wrong = values.copy()
            wrong[0, place] = bad
            with pytest.raises(NonFiniteError, match=r"'cell\.2'.*found 1 of "):
                check.check({"cell.2": wrong})


def test_an_input_that_is_not_finite_is_the_cause() -> None:
    check = FiniteCheck(PLAN)
    wrong = np.array([1, np.nan, 1], dtype=np.float32)
    values = {"cell.2": wrong, "x": GOOD, "ids": np.zeros(1, np.int64)}
    with pytest.raises(NonFiniteError, match=r"'cell\.2'.*; usually layer two"):
        check.check(values)
    with pytest.raises(NonFiniteError, match=r"'cell\.2'.*; input 'x' is not finite itself"):
        check.check({**values, "x": wrong})
    check.check({"x": wrong, "cell.2": GOOD})
