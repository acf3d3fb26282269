"""`evermind-pack trace` as a script meets it."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_runtime.trace import read_trace

from evermind_pack.cli import main
from tests.cli import command_line
from tests.packages import LM_CONFIG, export, lm_source, random_source

OLMOE = Path(__file__).parent.parent / "fixtures" / "traces" / "olmoe_299.jsonl"


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    return command_line.call(capsys, "trace", *arguments)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lm_source(), tmp_path_factory.mktemp("trace") / "lm")


@pytest.fixture
def recorded(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "t.jsonl"
    assert call(capsys, package, "--tokens", "1,2,3", "--max-new", 30, "-o", path, "-q")[0] == 0
    return path


def test_recording_does_not_depend_on_the_budget(
    package: Path, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    code, out, err = call(
        capsys,
        *(package, "--tokens", "1,2,3", "--max-new", 30, "-o", other),
        *("--budget", "25%", "--json"),
    )
    assert (code, err) == (0, "")
    assert other.read_bytes() == recorded.read_bytes()
    result = json.loads(out)
    assert result["generated"] == 30
    assert result["tokens"] == read_trace(other).tokens
    assert result["cycle_share"] == 0.25
    assert result["experts"] == 24


def test_replay_prints_every_policy_at_every_budget(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "--replay", recorded, "--budgets", "25%,50%,100%")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["hit", "rate", "25%", "50%", "100%"]
    table = {line[0]: [float(rate) for rate in line[1:]] for line in lines[1:]}
    assert list(table) == ["decayed", "pinned", "lru", "lfu", "belady"]
    for rates in table.values():
        assert rates[0] <= rates[1] <= rates[2] == table["belady"][2]
        assert all(rate <= bound for rate, bound in zip(rates, table["belady"], strict=True))
    assert "one token's cycle is 25.0%" in err
    code, out, _ = call(capsys, "--replay", recorded, "--budgets", "20KiB", "--json")
    rows = json.loads(out)["results"]
    assert [row["policy"] for row in rows] == list(table)
    assert {row["budget"] for row in rows} == {20 * 1024}
    assert all(row["bytes_read"] > 0 for row in rows)


def test_what_nobody_chose_leaves_out_what_holds_no_step(tmp_path: Path, capsys: Any) -> None:
    """One layer of few experts: a step takes more than the smaller of the usual budgets."""
    for experts, top_k, expected in ((8, 2, ["25%", "50%"]), (1, 1, ["100%"])):
        config = {**LM_CONFIG, "numLayers": 1, "numExperts": experts, "topK": top_k}
        package = export(random_source("evermind-lm", config), tmp_path / f"p{experts}")
        trace = tmp_path / f"t{experts}"
        assert call(capsys, package, "--tokens", "1", "--max-new", 4, "-o", trace)[0] == 0
        code, out, _ = call(capsys, "--replay", trace)
        assert code == 0
        assert out.splitlines()[0].split() == ["hit", "rate", *expected]


@pytest.mark.parametrize("steps", [None, "decode"])
def test_arrays_are_recorded_too(steps: str | None, tmp_path: Path, capsys: Any) -> None:
    """A package that does not generate: what it routes to is what it puts out."""
    config = {"modelDim": 16, "hiddenDim": 24, "numExperts": 6, "topK": 2}
    package = export(random_source("shared-expert-moe", config), tmp_path / "layer")
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    options = ["--steps", steps] if steps else []
    path = tmp_path / "t.jsonl"
    code, out, err = call(
        capsys, package, "--inputs", tmp_path / "in.npz", *options, "-o", path, "--json"
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["tokens"], result["generated"]) == (5, 0)
    assert result["steps"] == (5 if steps else 1)
    with em.load(package) as model:
        ids = model.forward({"x": x})["ids.0"]
    rows = [row for step in read_trace(path).steps for row in step.tokens]
    assert [sorted(row) for row in rows] == [sorted(row) for row in ids.tolist()]

    recorded = path.read_bytes()
    np.savez(tmp_path / "in.npz", y=x)
    assert call(capsys, package, "--inputs", tmp_path / "in.npz", "-o", path)[0] == 2
    assert path.read_bytes() == recorded


def test_plots_are_pictures(recorded: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    plot, heat = tmp_path / "hits.png", tmp_path / "heat.png"
    assert call(capsys, "--replay", recorded, "--plot", plot, "--heatmap", heat, "-q")[0] == 0
    for path in (plot, heat):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", data[16:24])) > 300


def test_a_plot_without_matplotlib_names_the_extra(
    recorded: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = call(capsys, "--replay", recorded, "--heatmap", tmp_path / "heat.png")
    assert (code, out) == (2, "")
    assert "evermind-pack[plot]" in err
    assert not (tmp_path / "heat.png").exists()


def test_a_profile_can_be_run_with(
    package: Path, recorded: Path, tmp_path: Path, capsys: Any
) -> None:
    heat = tmp_path / "profile.json"
    assert call(capsys, "--replay", recorded, "--profile", heat, "-q")[0] == 0
    with em.load(package, budget="50%", policy="pinned", profile=heat) as model:
        assert len(list(model.generate([1, 2, 3], max_new_tokens=5))) == 5


def test_a_trace_of_another_tool(package: Path, capsys: Any) -> None:
    code, out, err = call(capsys, "--replay", OLMOE, "--budgets", "25%", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["tokens"], result["layers"], result["experts"]) == (299, 16, 1024)
    assert result["results"][0]["bytes_read"] is None
    assert "--package says how many" in err
    code, _, err = call(capsys, "--replay", OLMOE, "--budgets", "1GiB")
    assert code == 2
    assert "--package PKG" in err
    code, _, err = call(capsys, "--replay", OLMOE, "--package", package)
    assert code == 2
    assert "expected at most 2 different experts" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a package to record from, or --replay"),
        (["PKG", "--replay", "t"], "either a package to record from, or --replay"),
        (["PKG", "-o", "t"], "needs --prompt"),
        (["PKG", "--tokens", "1", "-o", "t", "--steps", "decode"], "no meaning without --inputs"),
        (["PKG", "--inputs", "i", "-o", "t", "--seed", "1"], "--seed has no meaning with --inputs"),
        (["PKG", "--inputs", "missing.npz", "-o", "t"], "missing.npz: cannot be read as .npz"),
        (["PKG", "--inputs", "t", "-o", "t"], "it is what is read"),
        (["PKG", "--tokens", "1"], "-o FILE"),
        (
            ["PKG", "--tokens", "1", "-o", "t", "--budgets", "5%"],
            "--budgets has no meaning without",
        ),
        (["PKG", "--tokens", "1", "-o", "missing/t"], "cannot be written"),
        (["PKG", "--tokens", "1,x", "-o", "t"], "expected ids like 1,2,3"),
        (["--replay", "TRACE", "--seed", "1"], "--seed has no meaning with --replay"),
        (["--replay", "TRACE", "--budgets", ","], "expected sizes like"),
        (["--replay", "TRACE", "--budgets", "many"], "found 'many'"),
        (["--replay", "TRACE", "--budgets", "1%"], "cannot hold the experts of one step"),
        (["--replay", "TRACE", "--budgets", "1%"], "Give at least 13056 bytes, 8.4% of all"),
        (["--replay", "missing"], "cannot be read"),
    ],
)
def test_usage_errors(
    arguments: list[str],
    message: str,
    package: Path,
    recorded: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"PKG": str(package), "TRACE": str(recorded)}
    code, out, err = call(capsys, *(places.get(word, word) for word in arguments))
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PKG", "--tokens", "1", "-o", "PKG/manifest.json"], "would be a file of the package"),
        (["PKG", "--tokens", "1", "-o", "PKG/experts/t"], "would be a file of the package"),
        (["--replay", "TRACE", "--profile", "PKG/profile.json"], "would be a file of the package"),
        (["--replay", "TRACE", "--heatmap", "PKG/p.png"], "would be a file of the package"),
        (["--replay", "TRACE", "--profile", "TRACE"], "it is what is read"),
        (["--replay", "TRACE", "--profile", "missing/p.json"], "its folder is not there"),
        (["--replay", "TRACE", "--heatmap", "missing/p.png"], "its folder is not there"),
        (["--replay", "TRACE", "--plot", "x.txt"], "the name of a picture, as x.png, found '.txt'"),
        (["--replay", "TRACE", "--plot", "x"], "the name of a picture, as x.png, found 'none'"),
        (["--replay", "TRACE", "--profile", "p", "--plot", "p"], "a file of its own"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_runs(
    arguments: list[str],
    message: str,
    package: Path,
    recorded: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    places = {"PKG": str(package), "TRACE": str(recorded)}
    for name in ("load_model", "replay"):
        monkeypatch.setattr(f"evermind_pack.cli.trace.{name}", lambda *_, **__: pytest.fail("ran"))
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    words = [word.replace("PKG", places["PKG"]) for word in arguments]
    code, out, err = call(capsys, *(places.get(word, word) for word in words))
    assert (code, out) == (2, "")
    assert message in err
    assert {path: path.read_bytes() for path in package.rglob("*") if path.is_file()} == before


def test_a_web_pages_manifest_makes_no_package(recorded: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "page", "icons": []}')
    profile = tmp_path / "profile.json"
    assert call(capsys, "--replay", recorded, "--profile", profile, "-q")[0] == 0
    assert profile.exists()


def test_a_model_without_experts_is_refused(tmp_path: Path, capsys: Any) -> None:
    from tests.packages import GOLDEN

    package = tmp_path / "mood"
    source = GOLDEN / "limbic_small" / "limbic.v1.bin"
    assert main(["export", str(source), "-o", str(package), "-q"]) == 0
    capsys.readouterr()
    code, _, err = call(capsys, package, "--tokens", "1", "-o", tmp_path / "t")
    assert code == 2
    assert "no experts" in err
