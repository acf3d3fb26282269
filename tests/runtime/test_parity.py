"""parity.json: what it may say, and what is reported when a package does not live up to it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_manifests.errors import ClosedError
from evermind_manifests.package import open_package
from evermind_manifests.problems import Problem
from evermind_runtime.model import Model
from evermind_runtime.parity import parity_problems

from tests.packages import export, golden_source, put_file

Case = dict[str, Any]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return export(golden_source("lm_small"), tmp_path / "lm", parity=True, dtype="f32")


def problems(package: Path) -> list[Problem]:
    with open_package(package) as opened:
        return parity_problems(opened)


def rewrite(package: Path, text: str) -> None:
    """Give the package another parity file, its digest set right."""
    put_file(package, "parity.json", text.encode())


def array(values: Any, dtype: str) -> dict[str, Any]:
    stored = np.asarray(values, dtype={"i64": "<i8", "f32": "<f4"}[dtype])
    data = base64.b64encode(stored.tobytes()).decode()
    return {"dtype": dtype, "shape": list(stored.shape), "data": data}


def test_a_sound_package_has_no_problems(package: Path) -> None:
    assert problems(package) == []


def test_without_a_parity_file_nothing_is_shown(tmp_path: Path) -> None:
    found = problems(export(golden_source("lm_small"), tmp_path / "lm"))
    assert [(item.code, item.severity) for item in found] == [("parity", "error")]
    assert "no parity file" in found[0].message


def _set(*path: Any) -> Callable[[Case], None]:
    *above, last, value = path

    def change(case: Case) -> None:
        for name in above:
            case = case[name]
        case[last] = value

    return change


def _add(values: Any, dtype: str) -> Callable[[Case], None]:
    return _set("inputs", "tokens", array(values, dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("outputs", {}), "outputs: expected at least one"),
        (_set("inputs", {}), "found none"),
        (_set("tolerance", 0.5), "tolerance"),
        (_set("tolerance", -1e-9), "tolerance"),
        (_set("tolerance", 1e308), "tolerance"),
        (_set("tolerance", "1e-5"), "float"),
        (_set("inputs", "tokens", "data", "!!"), "ase64"),
        (_set("inputs", "tokens", "data", "ü"), "ASCII"),
        (_set("inputs", "tokens", "data", "AAAA"), "parity.json"),
        (_set("inputs", "tokens", "shape", [-1]), "shape"),
        (_set("inputs", "tokens", "shape", [2**62, 2**62]), "parity.json"),
        (_set("inputs", "tokens", "dtype", "f64"), "f64"),
        (_add([[[1]]], "i64"), "batch"),
        (_add([1.0, 2.0], "f32"), "expected int64"),
        (_add([1, 9999], "i64"), "9999"),
        (_set("outputs", "smell", array([1], "i64")), "smell"),
        (_set("outputs", "logits", array([1.0], "f32")), "expected shape (1,)"),
    ],
)
def test_a_case_that_cannot_be_is_a_problem(
    change: Callable[[Case], None], message: str, package: Path
) -> None:
    parity = json.loads((package / "parity.json").read_text())
    change(parity["cases"][0])
    rewrite(package, json.dumps(parity))
    found = problems(package)
    assert {(item.code, item.place) for item in found} == {("parity", "parity.json")}
    assert message in f"{found[0].place}: {found[0].message}"


@pytest.mark.parametrize("text", ['{"cases": []}', "{}", "[", '{"cases": 1}', ""])
def test_a_file_without_cases_is_a_problem(text: str, package: Path) -> None:
    rewrite(package, text)
    assert [item.code for item in problems(package)] == ["parity"]


def test_one_wrong_case_does_not_hide_another(package: Path) -> None:
    """The first case's results are off, the second cannot run: both are said."""
    parity = json.loads((package / "parity.json").read_text())
    case = parity["cases"][0]
    ids = case["outputs"]["ids.0"]
    off = array(np.zeros(ids["shape"]) - 1, "i64")
    broken = {**case, "inputs": {"tokens": array([1.5], "f32")}}
    parity["cases"] = [{**case, "outputs": {"ids.0": off}}, broken]
    rewrite(package, json.dumps(parity))
    messages = [item.message for item in problems(package)]
    assert sum("case 0" in message and "integers differ" in message for message in messages) == 2
    assert any("case 1" in message and "expected int64" in message for message in messages)


def test_integers_are_not_compared_with_floats(package: Path) -> None:
    parity = json.loads((package / "parity.json").read_text())
    outputs = parity["cases"][0]["outputs"]
    ids = np.frombuffer(base64.b64decode(outputs["ids.0"]["data"]), "<i8")
    outputs["ids.0"] = array(ids.reshape(outputs["ids.0"]["shape"]), "f32")
    rewrite(package, json.dumps(parity))
    found = problems(package)
    assert len(found) == 2
    assert "expected float32, found int64" in found[0].message


@pytest.mark.parametrize(
    ("expected", "computed", "same"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([np.nan, 1.0], [np.nan, 1.1], False),
        ([np.nan, 1.0], [0.0, 1.0], False),
        ([0.0, 1.0], [np.nan, 1.0], False),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([np.inf, 1.0], [3.0, 1.0], False),
        ([0.0, 1.0], [0.0, np.inf], False),
    ],
)
def test_what_is_no_number_must_be_none_on_both_sides(
    expected: list[float],
    computed: list[float],
    same: bool,
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parity = json.loads((package / "parity.json").read_text())
    parity["cases"][0]["outputs"] = {"logits": array(expected, "f32")}
    rewrite(package, json.dumps(parity))
    monkeypatch.setattr(
        Model, "forward", lambda *_, **__: {"logits": np.array(computed, np.float32)}
    )
    assert (problems(package) == []) is same


def test_damage_met_on_the_way_is_an_integrity_problem(package: Path) -> None:
    for pattern in ("graphs/*", "experts/*/*"):
        path = next(iter(sorted(package.glob(pattern))))
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        found = problems(package)
        assert [item.integrity for item in found] == [True], pattern
        assert path.name in found[0].message
        path.write_bytes(data)


def test_any_other_failure_is_a_problem_too(package: Path, monkeypatch: Any) -> None:
    def burst(*_: Any, **__: Any) -> None:
        raise RuntimeError("the kernel gave up")

    monkeypatch.setattr(Model, "forward", burst)
    found = problems(package)
    assert {item.code for item in found} == {"parity"}
    assert "the kernel gave up" in found[0].message


def test_the_model_is_given_back_and_the_package_is_not(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Model] = []
    begin = Model.__init__

    def kept(self: Model, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        models.append(self)

    monkeypatch.setattr(Model, "__init__", kept)
    with open_package(package) as opened:
        for _ in range(2):
            assert parity_problems(opened) == []
    assert len(models) == 2
    for model in models:
        with pytest.raises(ClosedError):
            model.forward({"tokens": [1]})
