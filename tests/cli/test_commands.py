"""The command line as a script meets it: contracts, exit codes, JSON, errors."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evermind_pack.cli import COMMANDS, main
from tests.cli.command_line import call
from tests.packages import GOLDEN, golden_case, put_file


@pytest.fixture
def lm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    package = tmp_path / "lm"
    code, _, _ = call(
        capsys, "export", GOLDEN / "lm_small" / "lm.v1.bin", "-o", package, "--dtype", "f32"
    )
    assert code == 0
    return package


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert f"evermind-pack {command}" in out.partition("examples:")[2]
    assert "--json" in out


def test_without_a_command_the_choices_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys)
    assert code == 2
    assert all(name in out for name in COMMANDS)
    with pytest.raises(SystemExit) as exit_info:
        main(["explode"])
    assert exit_info.value.code == 2
    code, _, err = call(capsys, "run", "pkg")
    assert (code, "--prompt, --tokens, --inputs and --chat" in err) == (2, True)


@pytest.mark.parametrize(
    ("case", "stem"), [("lm_small", "lm"), ("moe_six", "moe"), ("limbic_small", "limbic")]
)
@pytest.mark.parametrize("target", ["p", "p.zip"])
@pytest.mark.parametrize("layout", ["files", "pool"])
def test_export_validate_inspect(
    case: str,
    stem: str,
    target: str,
    layout: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, package = GOLDEN / case / f"{stem}.v2.bin", tmp_path / target
    code, out, _ = call(
        capsys, "export", source, "-o", package, "--layout", layout, "--license", "MIT", "--json"
    )
    exported = json.loads(out)
    assert code == 0
    assert exported["parity"] is True
    code, out, _ = call(capsys, "validate", package, "--deep", "--run", "--json")
    assert code == 0
    assert json.loads(out)["problems"] == []
    code, out, _ = call(capsys, "inspect", package, "--json", "--shards")
    summary = json.loads(out)
    assert code == 0
    assert summary["digest"] == exported["digest"]
    assert len(summary["shards"]) == summary["experts"] == exported["experts"]
    code, out, _ = call(capsys, "inspect", package)
    assert exported["digest"] in out


def test_run_tokens_gives_the_contracted_json(lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for one in golden_case("lm_small")["sampled"]:
        arguments = ["--tokens", ",".join(map(str, one["prompt"])), "--json"]
        arguments += ["--max-new", one["max_new_tokens"], "--temperature", one["temperature"]]
        if "seed" in one:
            arguments += ["--seed", one["seed"]]
        if "stop_token" in one:
            arguments += ["--stop-token", one["stop_token"]]
        code, out, _ = call(capsys, "run", lm, *arguments, "--budget", "50%")
        result = json.loads(out)
        assert code == 0
        assert result["tokens"] == one["tokens"]
        assert {
            "text",
            "tokens_per_second",
            "ttft_ms",
            "expert_hits",
            "expert_misses",
            "bytes_read",
            "peak_resident_expert_bytes",
        } <= result.keys()
        assert result["peak_resident_expert_bytes"] <= result["budget_bytes"]


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_run_arrays_with_a_batch_and_state(
    lm: Path, steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = golden_case("lm_small")["forward"][0]
    tokens = np.array([one["tokens"], one["tokens"][::-1]])
    paths = {name: tmp_path / f"{name}.npz" for name in ("a", "b", "whole", "sa", "sb", "out")}
    np.savez(paths["whole"], tokens=tokens)
    np.savez(paths["a"], tokens=tokens[:, :5])
    np.savez(paths["b"], tokens=tokens[:, 5:])
    run = ["run", lm, "--steps", steps]
    assert call(capsys, *run, "--inputs", paths["whole"], "--outputs", paths["out"])[0] == 0
    whole = np.load(paths["out"])
    assert set(whole.files) == {"logits", "ids.0", "gates.0", "ids.1", "gates.1"}
    scale = np.abs(one["logits"]).max()
    assert np.abs(whole["logits"][0] - one["logits"]).max() <= 2e-6 * scale

    assert call(capsys, *run, "--inputs", paths["a"], "--state-out", paths["sa"])[0] == 0
    code, _, _ = call(
        capsys,
        *run,
        *("--inputs", paths["b"], "--outputs", paths["out"]),
        *("--state-in", paths["sa"], "--state-out", paths["sb"]),
    )
    assert code == 0
    rest = np.load(paths["out"])["logits"]
    assert np.abs(rest - whole["logits"][:, 5:]).max() <= 1e-5 * scale
    assert np.load(paths["sb"])["conv.0"].shape == (2, 2, 16)


def test_limbic_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "mood"
    call(capsys, "export", GOLDEN / "limbic_small" / "limbic.v1.bin", "-o", package)
    steps = golden_case("limbic_small")["steps_f32"]
    names = {"x": "x", "hidden": "hidden_in", "state": "state_in"}
    arrays = {k: np.float32([step[v] for step in steps]) for k, v in names.items()}
    np.savez(tmp_path / "in.npz", **arrays)
    code, _, _ = call(
        capsys, "run", package, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz"
    )
    assert code == 0
    out = np.load(tmp_path / "out.npz")
    assert set(out.files) == {"hidden", "delta", "reward"}
    np.testing.assert_allclose(out["delta"], [step["delta"] for step in steps], atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tokens", "1", "--budget", "10"], 2, "BudgetError"),
        (["--tokens", "1,x"], 2, "expected ids like 1,2,3"),
        (["--tokens", "99"], 2, "found 99"),
        (["--prompt", "hello"], 2, "no tokenizer"),
        (["--tokens", "1", "--device", "cuda"], 2, "DeviceError"),
        (["--tokens", "1", "--outputs", "x.npz"], 2, "--outputs has no meaning"),
        (["--inputs", "missing.npz", "--outputs", "x.npz"], 2, "missing.npz"),
        (["--inputs", "missing.npz"], 2, "--outputs"),
        (["--inputs", "i.npz", "--outputs", "o.npz", "--seed", "1"], 2, "--seed has no meaning"),
    ],
)
def test_usage_errors_say_what_to_do(
    lm: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = call(capsys, "run", lm, *arguments)
    assert (found, out) == (code, "")
    assert message in err
    found, out, _ = call(capsys, "run", lm, *arguments, "--json")
    assert found == code
    assert set(json.loads(out)["error"]) == {"type", "message", "hint"}


def test_damage_ends_with_the_integrity_code(lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next(lm.glob("experts/*/*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, _, err = call(capsys, "run", lm, "--tokens", "1,2,3,4,5,6,7,8,9")
    assert code == 3
    assert "expected" in err
    assert "found" in err
    assert call(capsys, "validate", lm)[0] == 0
    code, out, _ = call(capsys, "validate", lm, "--deep", "--json")
    assert code == 3
    assert any(item["code"] == "digest-mismatch" for item in json.loads(out)["problems"])


def test_a_wrong_function_fails_the_run_level(lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A parity file of another model: every byte is sound, the results are not."""
    parity = json.loads((lm / "parity.json").read_text())
    other = dict(parity["cases"][0]["inputs"]["tokens"])
    ids = np.zeros(other["shape"], dtype="<i8")
    other["data"] = base64.b64encode(ids.tobytes()).decode()
    parity["cases"][0]["inputs"]["tokens"] = other
    put_file(lm, "parity.json", json.dumps(parity).encode())
    assert call(capsys, "validate", lm, "--deep")[0] == 0
    code, out, _ = call(capsys, "validate", lm, "--run", "--json")
    assert code == 1
    assert {item["code"] for item in json.loads(out)["problems"]} == {"parity"}


def test_export_refuses_what_is_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "junk").write_bytes(b"not a model at all")
    code, _, err = call(capsys, "export", tmp_path / "junk", "-o", tmp_path / "p")
    assert code == 1
    assert "junk" in err
    code, _, err = call(capsys, "export", tmp_path / "none", "-o", tmp_path / "p")
    assert code == 2
    assert not (tmp_path / "p").exists()


def test_train_export_run_for_every_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    np.savez(tmp_path / "moe.npz", x=rng.normal(size=(40, 6)), target=rng.normal(size=(40, 6)))
    np.savez(
        tmp_path / "limbic.npz",
        x=rng.normal(size=(20, 5)),
        state=rng.uniform(size=(20, 8)),
        delta=rng.uniform(-0.5, 0.5, size=(20, 8)),
        reward=rng.normal(size=20),
    )
    small = ["--d-model", 16, "--layers", 2, "--conv", 3, "--batch", 2, "--window", 24]
    jobs = {
        "lm": ["--corpus", tmp_path / "text.txt", "--vocab", 256, *small, "--experts", 4],
        "moe": ["--data", tmp_path / "moe.npz", "--experts", 4, "--hidden", 8],
        "limbic": ["--data", tmp_path / "limbic.npz"],
    }
    for family, arguments in jobs.items():
        run, package = tmp_path / family, tmp_path / f"{family}-package"
        code, out, _ = call(
            capsys, "train", family, "-o", run, "--steps", 12, "--seed", 3, "--json", *arguments
        )
        result = json.loads(out)
        assert (code, result["step"], result["finished"]) == (0, 12, True)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics] == list(range(1, 13))
        assert metrics[-1]["loss"] < metrics[0]["loss"]
        assert call(capsys, "export", run, "-o", package, "-q")[0] == 0
        assert call(capsys, "validate", package, "--deep", "--run", "-q")[0] == 0
    code, out, _ = call(
        capsys, "run", tmp_path / "lm-package", "--prompt", "the ", "--max-new", 5, "--json"
    )
    assert len(json.loads(out)["tokens"]) == 5
    assert "12 steps" in (tmp_path / "lm-package" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lm", "-o", "r"], "needs a corpus"),
        (["moe", "-o", "r"], "needs --data"),
        (["lm", "--stdlib"], "-o RUN is needed"),
        (["moe", "--data", "d.npz", "-o", "r", "--layers", "3"], "--layers has no meaning"),
        ([], "give what to train"),
        (["--resume", "nowhere"], "nowhere: there is no such folder"),
        (["lm", "--corpus", "nowhere", "-o", "r"], "nowhere: there is no such folder or file"),
    ],
)
def test_train_says_what_is_missing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "train", *arguments)
    assert code == 2
    assert message in err


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog. " * 200)
    run = tmp_path / "run"
    base = [sys.executable, "-m", "evermind_pack", "train"]
    small = ["--d-model", "16", "--layers", "1", "--batch", "2", "--window", "24"]
    command = [*base, "lm", "--corpus", str(tmp_path / "text.txt"), "--vocab", "256", *small]
    process = subprocess.Popen(
        [*command, "-o", str(run), "--steps", "100000"], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    checkpoint = next(run.glob("checkpoint-*"))
    record = json.loads((checkpoint / "trainer.json").read_text())
    # Shorten the plan, so that the resumed run comes to its end.
    record["plan"]["steps"] = record["step"] + 2
    (checkpoint / "trainer.json").write_text(json.dumps(record))
    result = subprocess.run(
        [*base, "--resume", str(run), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["finished"] is True


def test_a_closed_pipe_is_no_error(lm: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "evermind_pack", "inspect", str(lm), "--shards"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert b"Traceback" not in process.stderr


def test_the_demo_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three training steps are enough to see all four stages and the reuse of a finished run."""
    demo = ["demo", "-o", tmp_path / "demo", "--steps", 3, "--max-new", 12, "--json"]
    code, out, _ = call(capsys, *demo)
    result = json.loads(out)
    assert code == 0
    assert result["identical"] is True
    assert result["paged"]["expert_misses"] > 0
    assert result["paged"]["peak_resident_expert_bytes"] <= result["paged"]["budget_bytes"]
    code, again, _ = call(capsys, *demo)
    assert json.loads(again)["digest"] == result["digest"]
