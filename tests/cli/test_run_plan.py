"""`run --plan`: chosen, said aloud, or refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evermind_pack.cli import main
from tests.packages import export, lm_source


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lm_source(), tmp_path_factory.mktemp("plan") / "p")


def run(package: Path, *options: str) -> int:
    return main(["run", str(package), "--tokens", "1,2,3", "--max-new", "4", *options])


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ((), "resident"),
        (("--plan", "half"), "half"),
        (("--budget", "50%"), "paged"),
        (("--plan", "paged"), "paged"),
    ],
)
def test_the_plan_is_said_aloud(
    package: Path, options: tuple[str, ...], plan: str, capsys: Any
) -> None:
    assert run(package, *options, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["plan"] == plan
    assert result["plan_reason"]
    assert result["peak_resident_expert_bytes"] <= result["budget_bytes"]
    assert run(package, *options) == 0
    assert f"plan          {plan}: {result['plan_reason']}" in capsys.readouterr().err


def test_a_plan_without_room_is_refused(package: Path, capsys: Any) -> None:
    for plan in ("resident", "half"):
        assert run(package, "--plan", plan, "--budget", "50%") == 2
        said = capsys.readouterr().err
        assert f"plan: '{plan}' " in said
        enough = re.search(r"Give at least (\d+) bytes", said)
        assert enough
        assert run(package, "--plan", plan, "--budget", enough[1]) == 0
        capsys.readouterr()


def test_a_budget_that_thrashes_is_told_before_and_in_json(package: Path, capsys: Any) -> None:
    assert run(package, "--budget", "13056", "--json") == 0
    told = capsys.readouterr()
    (warning,) = json.loads(told.out)["warnings"]
    assert "expect 0% hits with the policy 'decayed'" in warning
    assert told.err == f"warning: {warning}\n"
    assert run(package, "--budget", "50%", "--json") == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_what_experts_do_is_told_by_no_pools(package: Path, capsys: Any) -> None:
    """Observed, tokens pass through the experts' own programs, which find them in memory."""
    assert run(package, "--introspect", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    experts = result["introspection"]["layers"][0]["experts"]
    assert result["plan"] == "half"
    assert "pools do not show" in result["plan_reason"]
    assert any(expert.get("magnitude") for expert in experts)
    layers = result["introspection"]["layers"]
    touched = sum(expert["misses"] > 0 for layer in layers for expert in layer["experts"])
    assert result["expert_misses"] == touched  # each is read once
    assert run(package, "--introspect", "--plan", "resident") == 2
    assert "plan: 'resident' cannot be observed" in capsys.readouterr().err
