"""`evermind-pack bench` as a script meets it. How fast this machine is decides nothing."""

from __future__ import annotations

import functools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from evermind_manifests.errors import BudgetError, EvermindPackError, InputError, LocationError
from evermind_runtime.forecast import Range, forecast
from evermind_runtime.layers import ExpertLayer
from evermind_runtime.machine import measure_machine
from evermind_runtime.sizes import ModelSizes, StateSizes
from msgspec import structs

from evermind_pack.benching import Job, Round, report, run_rounds
from evermind_pack.benching import round as benching_round
from evermind_pack.benching.report import same_tokens
from evermind_pack.benching.round import run_round
from tests.cli.command_line import call
from tests.packages import export, golden_source, lm_source, random_source
from tests.runtime.test_forecast import MACHINE


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    brief = functools.partial(measure_machine, seconds=0.1)
    monkeypatch.setattr("evermind_pack.planning.measure_machine", brief)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lm_source(), tmp_path_factory.mktemp("bench") / "lm")


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A package that does not generate."""
    config = {"inputDim": 16, "hiddenDim": 24, "outputDim": 16, "numExperts": 6, "topK": 2}
    return export(random_source("shared-expert-moe", config), tmp_path / "layer")


def job(package: Path, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "package": str(package),
        "budget": 2**20,
        "prompt": [1, 2, 3],
        "prompt_tokens": 3,
        "max_new": 6,
        "seed": 1,
        "temperature": 1.0,
        "cold": False,
        "options": {},
    }
    return Job(**{**fields, **changes})


def test_a_bench_reports_every_budget(package: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "speed.png"
    code, out, err = call(
        capsys,
        *("bench", package, "--budgets", "50%,100%", "--max-new", 8, "--rounds", 1),
        *("--threads", 1, "--io", "buffered", "--tokens", "1,2,3", "--json", "--plot", plot),
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert [one["name"] for one in result["results"]] == ["100%", "50%"]
    assert result["same_tokens"] is True
    assert (result["unit"], result["prompt_tokens"], result["cold"]) == ("tokens", 3, None)
    assert result["machine"]["disk_where"] == "the package's own files"
    for one in result["results"]:
        assert one["tokens_per_second"]["median"] > 0
        assert 0 <= one["hit_rate"] <= 1
        assert one["peak_expert_bytes"] <= one["budget"]
        assert one["rss_beyond"] > 0
        assert (one["io"], one["plan"]) == (
            "buffered",
            {"100%": "half", "50%": "paged"}[one["name"]],
        )
        assert one["share_of_bound"] > 0
        assert one["share_of_bound"] * one["bound"] == pytest.approx(
            one["tokens_per_second"]["median"]
        )
        assert set(one["forecast"]["tokens_per_second"]) == {"even", "skewed"}
        assert one["off_at_hit_rate"] == pytest.approx(
            one["tokens_per_second"]["median"] / one["forecast_at_hit_rate"] - 1
        )
    # Reads follow from misses: every expert is as large as any other.
    half = result["results"][1]
    size = result["sizes"]["layers"][0]["bytes"]
    assert half["bytes_per_token"] == pytest.approx((1 - half["hit_rate"]) * 6 * size)
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", plot.read_bytes()[16:24])) > 300


def test_a_package_that_does_not_generate_is_benched_by_rows(layer: Path, capsys: Any) -> None:
    arguments = ("--budgets", "100%", "--rounds", 1, "--max-new", 3, "--prompt-tokens", 5)
    code, out, _ = call(capsys, "bench", layer, *arguments, "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["unit"], result["prompt_tokens"]) == ("rows", 5)
    assert result["same_tokens"] is None
    code, _, err = call(capsys, "bench", layer, "--tokens", "1")
    assert code == 2
    assert "--prompt-tokens" in err


def test_a_model_without_experts_has_one_row(tmp_path: Path, capsys: Any) -> None:
    mood = export(golden_source("limbic_small"), tmp_path / "mood")
    code, out, err = call(capsys, "bench", mood, "--rounds", 1, "--max-new", 3)
    assert code == 0
    assert "no experts" in out
    assert "rows/s" in out
    assert "medians of 1 round of 3 rows" in err
    code, out, _ = call(
        capsys,
        *("bench", mood, "--budgets", "100%,50%,100%", "--rounds", 1, "--max-new", 2, "--json"),
    )
    assert code == 0
    assert [one["name"] for one in json.loads(out)["results"]] == ["100%, 50%"]
    code, _, err = call(capsys, "bench", mood, "--plot", tmp_path / "p.png")
    assert code == 2
    assert "without experts" in err


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(
    package: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("evermind_pack.cli.bench.run_rounds", lambda *_, **__: pytest.fail("ran"))
    code, out, err = call(capsys, "bench", package, "--plot", tmp_path / "p.png")
    assert (code, out) == (2, "")
    assert "evermind-pack[plot]" in err


def test_the_plan_can_be_chosen(package: Path, capsys: Any) -> None:
    code, out, _ = call(
        capsys,
        *("bench", package, "--plan", "paged", "--budgets", "100%", "--rounds", 1),
        *("--max-new", 4, "--json"),
    )
    assert code == 0
    assert json.loads(out)["results"][0]["plan"] == "paged"
    code, _, err = call(capsys, "bench", package, "--plan", "half", "--budgets", "50%")
    assert code == 2
    assert "'half' keeps all experts" in err
    code, out, _ = call(
        capsys,
        *("bench", package, "--plan", "resident", "--budgets", "all", "--rounds", 1),
        *("--max-new", 2, "--json"),
    )
    assert code == 0
    assert [(one["name"], one["plan"]) for one in json.loads(out)["results"]] == [
        ("all", "resident")
    ]
    pooled = run_round(job(package, budget=None))
    assert pooled.plan == "resident"
    assert pooled.misses == 0


@pytest.mark.parametrize("plan", ["half", "resident"])
def test_a_plan_is_benched_with_the_budgets_that_hold_it(
    plan: str, package: Path, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "speed.png"
    code, out, _ = call(
        capsys,
        *("bench", package, "--plan", plan, "--rounds", 1, "--max-new", 2, "--json"),
        *("--plot", plot),
    )
    assert code == 0
    assert [(one["name"], one["plan"]) for one in json.loads(out)["results"]] == [("all", plan)]
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_forecast_is_drawn_as_far_as_was_measured(
    package: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools in float32 take twice what is stored in half precision."""
    pytest.importorskip("matplotlib")
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        "evermind_pack.cli.bench.plot_speeds", lambda *_, **curves: drawn.update(curves)
    )
    options = ("--budgets", "all,100%", "--rounds", 1, "--max-new", 2, "--plot")
    assert call(capsys, "bench", package, *options, tmp_path / "speed.png")[0] == 0
    least, *_, most = sorted(share for share, *_ in drawn["measured"])
    assert least == 1 < 1.9 < most
    shares = [share for share, *_ in drawn["forecast"]]
    assert shares == sorted(shares)
    assert shares[-2:] == [most, most]
    assert drawn["forecast"][-2][1] < drawn["forecast"][-1][1]


def test_what_was_measured_is_printed_before_it_is_drawn(
    package: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def fail(*_: Any, **__: Any) -> None:
        raise InputError("cannot draw")

    monkeypatch.setattr("evermind_pack.cli.bench.plot_speeds", fail)
    code, out, err = call(
        capsys,
        *("bench", package, "--budgets", "100%", "--rounds", 1, "--max-new", 2),
        *("--plot", tmp_path / "p.png"),
    )
    assert code == 2
    assert "cannot draw" in err
    assert "100%" in out
    assert "tokens/s" in out


def test_a_round_counts_decoding_only(package: Path) -> None:
    one = run_round(job(package, cold=True, max_new=20))
    assert len(one.tokens) == 20
    assert one.decoded == 19
    # Every token needs two experts in each of three layers; all are resident by then.
    assert one.hits + one.misses == 19 * 6
    assert one.bytes_read >= one.misses
    assert one.dropped is not None
    assert one.first_seconds > 0 < one.decode_seconds
    other = run_round(job(package, budget=20 * 1024, max_new=20))
    assert other.tokens == one.tokens
    assert other.misses > one.misses
    assert other.dropped is None
    assert other.peak_expert_bytes <= 20 * 1024


def test_a_cold_round_is_cold_when_it_loads_and_when_it_is_measured(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    results = iter([True, True, False, True])

    def drop(location: str) -> bool:
        assert location == str(package)
        happened.append("drop")
        return next(results)

    def measure(*_: Any) -> Any:
        happened.append("measure")
        return measured(*_)

    def loading(*_: Any, **options: Any) -> Any:
        happened.append("load")
        return loaded(*_, **options)

    measured, loaded = benching_round._measure, benching_round.load
    monkeypatch.setattr(benching_round, "_drop", drop)
    monkeypatch.setattr(benching_round, "_measure", measure)
    monkeypatch.setattr(benching_round, "load", loading)
    assert run_round(job(package, cold=True)).dropped is True
    assert happened == ["drop", "load", "measure", "drop", "measure"]
    assert run_round(job(package, cold=True)).dropped is False
    happened.clear()
    assert run_round(job(package)).dropped is None
    assert happened == ["load", "measure", "measure"]


def test_what_a_bench_was_told_and_warned_of_is_shown(package: Path, capsys: Any) -> None:
    arguments = ("--budgets", "12.5%", "--rounds", 1, "--max-new", 2, "--tokens", "1,2")
    arguments += ("--guess", "off", "--threads", 2)
    code, out, _ = call(capsys, "bench", package, *arguments, "--json")
    result = json.loads(out)
    assert (code, result["guess"], result["threads"]) == (0, "off", 2)
    told = ("routing", "trace", "profile", "context")
    assert [result[name] for name in told] == ["model", None, None, 4]
    (one,) = result["results"]
    assert one["forecast"]["verdict"] == "fits, but thrashes"
    even, skewed = (one["forecast"]["hit_rate"][end] for end in ("even", "skewed"))
    assert f"expect {even:.0%} to {skewed:.0%} hits" in one["warnings"][0]
    code, out, err = call(capsys, "bench", package, *arguments)
    assert code == 0
    assert "fits, but thrashes" in out
    assert "warning: budget 12.5%: the budget of" in err
    assert "2 threads computing" in err


def test_rounds_run_in_fresh_processes_and_in_turn(package: Path) -> None:
    told: list[tuple[int, int]] = []
    results = run_rounds(
        {"all": job(package), "half": job(package, budget=80 * 1024)},
        2,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [len(rounds) for rounds in results.values()] == [2, 2]
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert same_tokens(list(results.values()))
    first, second = results["all"]
    assert first.tokens != second.tokens, "every round samples anew"


def test_what_a_round_raises_is_raised(package: Path) -> None:
    with pytest.raises(BudgetError, match="cannot hold the experts of one step"):
        run_rounds({"tiny": job(package, budget=10)}, 1)


def test_a_path_may_be_any_bytes(package: Path) -> None:
    link = package.parent / os.fsdecode(b"lm \xff")
    link.symlink_to(package)
    (made,) = run_rounds({"all": job(link, max_new=2)}, 1)["all"]
    assert len(made.tokens) == 2
    with pytest.raises(LocationError, match="gone"):
        run_rounds({"all": job(package.parent / os.fsdecode(b"gone \xff"))}, 1)


def test_a_round_that_dies_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EvermindPackError, match=r"budget some: .* ended with code 1"):
        run_rounds({"some": job(package)}, 1)


def test_figures_follow_from_the_rounds() -> None:
    layers = (ExpertLayer(layer=0, experts=4, top_k=2, bytes=10**6),)
    sizes = ModelSizes(layers, 10**6, 10**6, StateSizes(), 10**6, 10**6, 10**6, 2)
    rounds = [
        Round(
            load_seconds=1,
            first_seconds=2,
            ttft_seconds=0.5,
            decode_seconds=seconds,
            cpu_seconds=1,
            decoded=10,
            tokens=[1],
            hits=15,
            misses=5,
            bytes_read=5 * 10**6,
            disk_bytes=disk,
            peak_expert_bytes=3 * 10**6,
            resident_bytes=10**6,
            rss_bytes=60 * 10**6,
            dropped=None,
            io="buffered",
            plan="paged",
            threads=1,
            warnings=["few hits"],
        )
        for seconds, disk in ((1.0, 10**6), (2.0, 0), (4.0, 9 * 10**6))
    ]
    predicted = forecast(sizes, 3 * 10**6, MACHINE.warm(), Range(0.5, 0.6))
    one = report("x", rounds, predicted, sizes, MACHINE, MACHINE.warm())
    assert (one.tokens_per_second.least, one.tokens_per_second.median) == (2.5, 5)
    assert one.tokens_per_second.most == 10
    assert one.hit_rate == 0.75
    assert one.warnings == ("few hits",)
    assert one.bytes_per_token == 5 * 10**5
    assert one.rss_beyond == 60 * 10**6 - 10**6 - 3 * 10**6
    # 0.1 MB a token from the disk at 1 GB/s, 0.4 MB from the page cache at 8 GB/s: 0.15 ms,
    # which is as much as 3 MB of weights take at 20 GB/s. All from the disk: 0.5 ms.
    assert one.bound == pytest.approx(1 / 0.15e-3)
    assert one.share_of_bound == pytest.approx(sorted([10 * 15e-5, 5 * 15e-5, 2.5 * 5e-4])[1])
    assert one.off_first == pytest.approx(2 / predicted.ttft_seconds.even - 1)
    assert one.off_rss == pytest.approx(60 * 10**6 / predicted.rss - 1)
    assert (one.forecast_disk_how, one.forecast_disk_rate) == ("warm", MACHINE.cached_rate)
    even = predicted.tokens_per_second.even
    assert one.off == pytest.approx(5 / even - 1)
    unknown = [structs.replace(item, disk_bytes=None) for item in rounds]
    assert report("x", unknown, predicted, sizes, MACHINE, MACHINE).bound == pytest.approx(2000)
    assert report("x", unknown, predicted, sizes, MACHINE, MACHINE.warm()).bound == pytest.approx(
        1 / 0.15e-3
    )


def processes_of(marker: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_threads_are_refused_before_anything_is_measured(
    package: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_pack.cli.bench.open_location", lambda *_: pytest.fail("opened"))
    code, out, err = call(capsys, "bench", package, "--threads", 64 * len(os.sched_getaffinity(0)))
    assert (code, out) == (2, "")
    assert "threads: expected 1 to " in err


def wait_for(condition: Any, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_bench_leaves_nothing_running(package: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "evermind_pack", "bench", str(package), "--max-new", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def children() -> list[int]:
        found = []
        for pid in processes_of("evermind_pack.benching.round"):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == process.pid:
                found.append(pid)
        return found

    try:
        assert wait_for(lambda: bool(children())), "no round was started"
        (child,) = children()
        os.kill(process.pid, how)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert err.strip() == b"interrupted"
    assert wait_for(lambda: not Path(f"/proc/{child}").exists()), "a round is still running"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PKG", "--max-new", "1"], "--max-new: expected 2 or more"),
        (["PKG", "--budgets", ","], "--budgets: expected sizes like"),
        (["PKG", "--budgets", "1%"], "cannot hold the experts of one step"),
        (["PKG", "--budgets", "much"], "--budgets: expected bytes"),
        (["PKG", "--prompt", "x"], "it has no tokenizer"),
        (["PKG", "--tokens", ""], "the prompt is empty"),
        (["PKG", "--temperature", "nan"], "--temperature: expected a finite number"),
        (["PKG", "--temperature", "inf"], "--temperature: expected a finite number"),
        (["PKG", "--plot", "speed.txt"], "expected the name of a picture, as speed.png"),
        (["PKG", "--trace", "t.png", "--plot", "t.png"], "it is what is read"),
        (["PKG", "--tokens", "1,x"], "expected ids like 1,2,3"),
        (["PKG", "--io", "direct", "--rounds", "1"], "direct reads of"),
        (["PKG", "--policy", "pinned"], "needs a routing profile"),
        (["PKG", "--profile", "p"], "without --policy pinned"),
        (["PKG", "--plot", "missing/p.png"], "its folder is not there"),
        (["PKG", "--tokens", "1,4000", "--budgets", "100%"], "expected token ids from 0 to 95"),
        (["https://models.example/lm"], "expected a package on this machine"),
        (["missing"], "there is no such folder or file"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, package: Path, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(
        capsys, "bench", *(package if word == "PKG" else word for word in arguments)
    )
    assert (code, out) == (2, "")
    assert message in err
