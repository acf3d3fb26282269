"""`evermind-pack plan` as a script meets it."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import evermind_runtime as em
import pytest
from evermind_runtime.machine import measure_machine

from tests.cli.command_line import call
from tests.packages import GOLDEN, export, lm_source
from tests.runtime.test_forecast import MACHINE

COUNTS = json.loads((GOLDEN.parent / "huggingface" / "counts.json").read_text())
OLMOE_TRACE = GOLDEN.parent / "traces" / "olmoe_299.jsonl"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure briefly: how fast this machine is decides nothing here."""
    brief = functools.partial(measure_machine, seconds=0.1)
    monkeypatch.setattr("evermind_pack.planning.measure_machine", brief)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lm_source(), tmp_path_factory.mktemp("plan") / "lm")


def plan(capsys: Any, *arguments: Any, code: int = 0) -> dict[str, Any]:
    found, out, err = call(capsys, "plan", *arguments, "--json")
    assert (found, err) == (code, "")
    result: dict[str, Any] = json.loads(out)
    return result


def test_a_manifest_alone_is_enough(package: Path, tmp_path: Path, capsys: Any) -> None:
    whole = plan(capsys, package)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(package / "manifest.json", alone)
    for place in (alone, alone / "manifest.json"):
        result = plan(capsys, place)
        assert result["sizes"] == whole["sizes"]
        assert result["source"] == "manifest"
        assert result["machine"]["disk_where"] == f"a temporary file in {alone}"
    assert [path.name for path in alone.iterdir()] == ["manifest.json"]
    assert whole["machine"]["disk_where"] == "the package's own files"


def test_the_budgets_worth_comparing(package: Path, capsys: Any) -> None:
    result = plan(capsys, package)
    names = [one["name"] for one in result["forecasts"]]
    # A quarter of the experts is one token's cycle here.
    assert names == ["least", "one token's cycle, 25%", "50%", "all"]
    budgets = [one["budget"] for one in result["forecasts"]]
    assert budgets == sorted(budgets)
    assert budgets[0] == result["sizes"]["least_budget"]
    plans = [one["plan"] for one in result["forecasts"]]
    assert plans == ["paged", "paged", "paged", "resident"]
    # All experts in float32 pools, from shards in half precision.
    tensors = result["sizes"]["expert_parameters"] * 4
    assert budgets[-1] == tensors > result["sizes"]["all_expert_bytes"]
    assert [one["verdict"] for one in result["forecasts"]] == [
        "fits, but thrashes",
        "fits",
        "fits",
        "fits, all resident",
    ]
    assert result["recommended"]["budget"] == result["sizes"]["all_expert_bytes"]
    assert set(result["formula"]) >= {"tokens_per_second", "hit_rate", "rss", "bound"}
    told = ("policy", "prompt_tokens", "context", "routing", "trace", "profile")
    assert [result[name] for name in told] == ["decayed", 16, 4096, "model", None, None]
    assert result["threads"] == result["machine"]["threads"]
    assert result["constants"]["headroom"] == 0.1
    for name in ("prompt_expert_bytes", "prompt_parameters", "prompt_graph_runs"):
        assert result["forecasts"][0][name]["even"] > 0
    assert {"disk_rate", "memory_rate", "sha256_rate", "disk_note"} <= set(result["machine"])


def test_the_plan_is_the_one_that_loading_takes(package: Path, capsys: Any) -> None:
    for budget in (None, "100%", "25%"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with em.load(package, budget=budget) as model:
                taken = model.plan.name
        given = [] if budget is None else ["--budget", budget]
        assert plan(capsys, package, *given)["forecasts"][-1]["plan"] == taken


def test_a_memory_too_small_is_said_with_the_number_that_would_do(
    package: Path, capsys: Any
) -> None:
    result = plan(capsys, package, "--memory", "50MiB", code=1)
    assert {one["verdict"] for one in result["forecasts"]} == {"does not fit"}
    assert result["recommended"]["budget"] is None
    assert "does not run in 50.0 MiB" in result["recommended"]["why"]


def test_given_figures_are_used(package: Path, capsys: Any) -> None:
    slow, fast = (
        plan(capsys, package, "--disk-rate", rate, "--budget", "50%", "--memory", "1GiB")
        for rate in ("1MB", "10GB")
    )
    assert slow["machine"]["disk_how"] == "given"
    assert slow["machine"]["disk_rate"] == 1e6
    assert slow["memory"] == 2**30
    one, other = (
        next(item for item in result["forecasts"] if item["name"] == "50%")
        for result in (slow, fast)
    )
    assert one["tokens_per_second"]["even"] < other["tokens_per_second"]["even"]
    assert one["bytes_per_token"] == other["bytes_per_token"]


def test_a_trace_decides_the_hit_rate(package: Path, tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "t.jsonl"
    code, _, _ = call(
        capsys, "trace", package, "--tokens", "1,2,3", "--max-new", 20, "-o", trace, "-q"
    )
    assert code == 0
    result = plan(capsys, package, "--trace", trace, "--budget", "50%")
    rate = result["forecasts"][0]["hit_rate"]
    assert rate["even"] == rate["skewed"]
    assert (result["routing"], result["trace"]) == ("trace", str(trace))
    _, _, err = call(capsys, "plan", package, "--trace", trace)
    assert f"hit rates by replaying {trace}, policy decayed" in err
    assert "even to skewed" not in err
    code, _, err = call(capsys, "plan", package, "--trace", OLMOE_TRACE)
    assert code == 2
    assert "2 different experts" in err


@pytest.mark.parametrize("name", COUNTS)
def test_a_config_alone_is_enough(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Writing and reading a temporary file 34 times tells nothing new.
    monkeypatch.setattr("evermind_pack.planning.measure_machine", lambda *_, **__: MACHINE)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(COUNTS[name]["config"]))
    for place in (folder, folder / "config.json"):
        result = plan(capsys, place, "--context", 64)
        assert result["source"] == "config"
        assert result["family"] == COUNTS[name]["config"]["model_type"]
        assert result["sizes"]["total_parameters"] == COUNTS[name]["parameters"]
        assert result["forecasts"][-1]["name"].endswith("all")
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_lies_here_of_a_checkpoint_is_said(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_pack.planning.measure_machine", lambda *_, **__: MACHINE)
    config = {**next(iter(COUNTS.values()))["config"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"of which none lies in {tmp_path}" in call(capsys, "plan", tmp_path)[1]
    for shard in range(2):
        (tmp_path / f"model-{shard}.safetensors").write_bytes(bytes(10 * 1024))
    assert f"of which 20.0 KiB lies in {tmp_path}" in call(capsys, "plan", tmp_path)[1]
    # A cache's link to what was removed, and what is of no model.
    (tmp_path / "model-2.safetensors").symlink_to("blobs/gone")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(1024))
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert plan(capsys, tmp_path)["weights_here"] == 20 * 1024


def test_a_table_for_people(package: Path, capsys: Any) -> None:
    code, out, err = call(capsys, "plan", package, "--budget", "9KiB", "--budget", "25%")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("model ")
    assert "9KiB" in out
    assert "budget too small" in out
    assert "recommended" in lines[-1]
    assert "even to skewed" in err


def test_a_budget_too_small_has_neither_plan_nor_speed(package: Path, capsys: Any) -> None:
    one, other = plan(capsys, package, "--budget", "0", "--budget", "25%")["forecasts"][:2]
    assert (one["verdict"], one["fits"]) == ("budget too small", False)
    of_running = ("hit_rate", "bytes_per_token", "tokens_per_second", "bound", "ttft_seconds")
    for field in ("plan", *of_running):
        assert one[field] is None
        assert other[field] is not None
    _, out, _ = call(capsys, "plan", package, "--budget", "0")
    (row,) = (line for line in out.splitlines() if "budget too small" in line)
    assert "paged" not in row
    assert row.split()[:6] == ["0", "0", "bytes", "-", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PKG", "--dtype", "f16"], "no meaning for a package"),
        (["PKG", "--budget", "lots"], "--budget: expected bytes"),
        (["PKG", "--memory", "lots"], "--memory: expected bytes"),
        (["PKG", "--disk-rate", "10%"], "--disk-rate: expected bytes, or a size"),
        (["PKG", "--disk-rate", "0"], "--disk-rate: expected more than 0 bytes"),
        (["PKG", "--trace", "t", "--profile", "p"], "either --trace or --profile"),
        (["PKG", "--threads", "100000"], "threads: expected 1 to "),
        (["PKG", "--threads", "0"], "threads: expected 1 to "),
        (["PKG", "--policy", "lru", "--profile", "p"], "no meaning with --policy lru"),
        (["PKG", "--policy", "pinned"], "needs a routing profile"),
        (["missing"], "there is no such folder or file"),
        (["DENSE"], "expected a Mixture of Experts"),
        (["MOOD"], "no experts to page"),
    ],
)
def test_usage_errors(
    arguments: list[str],
    message: str,
    package: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.packages import golden_source

    monkeypatch.chdir(tmp_path)
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    places = {"PKG": package, "DENSE": dense}
    if "MOOD" in arguments:
        places["MOOD"] = export(golden_source("limbic_small"), tmp_path / "mood")
    code, out, err = call(capsys, "plan", *(places.get(word, word) for word in arguments))
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("option", ["--prompt-tokens", "--context"])
def test_a_sequence_has_a_length_that_one_can_have(option: str, package: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as usage:
        call(capsys, "plan", package, option, 10**15)
    assert usage.value.code == 2
    assert "expected at most 16777216" in capsys.readouterr().err
