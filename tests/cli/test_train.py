"""`train` and `demo`: folders they may write to, options and data they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_manifests.errors import InputError

from evermind_pack.training.run_lock import LOCK_NAME, run_lock
from tests.cli.command_line import call
from tests.packages import export, lm_source


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "moe.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.normal(size=(20, 6)), target=rng.normal(size=(20, 6)))
    return path


def moe(samples: Path, run: Path, *more: Any) -> list[Any]:
    small = ["--experts", 2, "--hidden", 4, "--steps", 3]
    return ["train", "moe", "--data", samples, "-o", run, *small, *more]


def test_a_run_that_failed_early_does_not_block_its_folder(
    samples: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    code, _, err = call(capsys, *moe(samples, run, "--lr", "1e30"))
    assert code == 1
    assert "Diverged" in err
    (run / ".writing-checkpoint-00000001").mkdir()
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.jsonl"}
    code, out, _ = call(capsys, *moe(samples, run, "--json"))
    assert (code, json.loads(out)["finished"]) == (0, True)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert not list(run.glob(".writing-*"))


def put(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"model_type": "other"}')
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.txt"],
        ["config.json"],
        ["config.json", "tokenizer.json"],
        ["config.json", "model.safetensors"],
        ["tokenizer.json"],
        ["metrics.jsonl"],
        ["config.json/notes.txt"],
        [".writing-config.json", "thesis.txt"],
    ],
)
def test_a_folder_of_anything_else_is_never_emptied(
    names: list[str], samples: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "d" / "run"
    before = put(run, *names)
    for command in (["demo", "-o", tmp_path / "d", "--steps", 2], moe(samples, run)):
        code, _, err = call(capsys, *command)
        assert code == 2
        assert str(run) in err
        assert names[0].partition("/")[0] in err
        assert contents(run) == before


def test_a_demo_of_other_steps_does_not_replace_a_run(
    samples: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "demo" / "run"
    assert call(capsys, *moe(samples, run))[0] == 0
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    code, _, err = call(capsys, "demo", "-o", run.parent, "--steps", 5)
    assert code == 2
    assert "a run of 3 steps is there, --steps says 5" in err
    assert "-o" in err
    assert contents(run) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--budget", "lots"), ("--temperature", "nan"), ("--max-new", "0")],
)
def test_the_demo_checks_how_to_generate_before_it_trains(
    option: str, value: str, tmp_path: Path, capsys: Any
) -> None:
    try:
        code, _, err = call(capsys, "demo", "-o", tmp_path / "d", option, value)
    except SystemExit as ended:
        code, err = ended.code, capsys.readouterr().err
    assert code == 2
    assert option.strip("-") in err
    assert not (tmp_path / "d").exists()


def test_a_foreign_checkpoint_folder_is_refused(tmp_path: Path, capsys: Any) -> None:
    before = put(tmp_path / "run", "checkpoint-500/weights.bin", "config.json")
    code, _, err = call(capsys, "demo", "-o", tmp_path, "--steps", 5)
    assert code == 1
    assert "trainer.json" in err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("value", ["0", "-5", "many"])
@pytest.mark.parametrize(
    "option",
    [
        "--steps",
        "--batch",
        "--experts",
        "--top-k",
        "--hidden",
        "--vocab",
        "--max-bytes",
        "--layers",
        "--d-model",
        "--conv",
        "--window",
    ],
)
def test_counts_are_one_or_more(option: str, value: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_info:
        call(capsys, "train", "lm", "--stdlib", "-o", tmp_path / "run", option, value)
    assert exit_info.value.code == 2
    assert option in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more", [["--steps", 9], ["--seed", 0], ["--lr", 0], ["--stdlib"], ["-o", "other"]]
)
def test_a_resumed_run_has_its_own_settings(
    more: list[Any], samples: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    assert call(capsys, *moe(samples, run))[0] == 0
    code, _, err = call(capsys, "train", "--resume", run, *more)
    assert code == 2
    assert str(more[0]).replace("-o", "--output") in err
    assert call(capsys, "train", "--resume", run, "--json", "-q")[0] == 0


def test_an_option_of_another_family_is_refused_even_when_zero(
    samples: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ["train", "limbic", "--data", samples, "-o", tmp_path / "run", "--aux-weight", 0]
    np.savez(samples, **{n: np.ones((4, 8)) for n in ("x", "state", "delta")}, reward=np.ones(4))
    code, _, err = call(capsys, *command)
    assert code == 2
    assert "--aux-weight has no meaning" in err


@pytest.mark.parametrize(
    "x",
    [
        np.full((20, 6), "a"),
        np.full((20, 6), None),
        np.ones((20, 6), complex),
        np.float32(1),
        np.ones(20),
        np.ones((0, 6)),
        np.ones((20, 0)),
        np.ones((19, 6)),
    ],
)
def test_samples_that_are_no_numbers_are_refused(
    x: Any, samples: Path, tmp_path: Path, capsys: Any
) -> None:
    np.savez(samples, target=np.ones((20, 6)), x=x)
    code, _, err = call(capsys, *moe(samples, tmp_path / "run"))
    assert code == 2
    assert samples.name in err
    assert not (tmp_path / "run").exists()


def test_a_demo_replaces_no_package_but_its_own(tmp_path: Path, capsys: Any) -> None:
    package = export(lm_source(), tmp_path / "demo" / "package")
    before = contents(package)
    code, _, err = call(capsys, "demo", "-o", package.parent, "--steps", 2)
    assert (code, "not of a demo's making" in err) == (2, True)
    assert contents(package) == before
    assert [path.name for path in package.parent.iterdir()] == ["package"]


HOLDER = """
import sys
from pathlib import Path
from evermind_pack.training.run_lock import run_lock

with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("resumed", [False, True])
def test_two_runs_do_not_write_to_one_folder(
    resumed: bool, samples: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    command = ["train", "--resume", run] if resumed else moe(samples, run)
    if resumed:
        assert call(capsys, *moe(samples, run))[0] == 0
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = contents(run)
        code, _, err = call(capsys, *command)
        assert (code, f"process {holder.pid} is training there" in err) == (2, True)
        assert contents(run) == before
        holder.kill()
    assert (run / LOCK_NAME).is_file()  # left by the process that was killed
    code, out, _ = call(capsys, *command, "--json")
    assert (code, json.loads(out)["finished"]) == (0, True)
    assert not (run / LOCK_NAME).exists()


def test_a_thread_may_lock_again_what_it_holds_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    refused: list[str] = []

    def another() -> None:
        try:
            with run_lock(folder):
                pass
        except InputError as error:
            refused.append(error.message)

    with run_lock(folder):
        with run_lock(folder):
            thread = threading.Thread(target=another)
            thread.start()
            thread.join()
        assert (folder / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    assert refused == [f"{folder}: process {os.getpid()} is training there"]
    assert list(tmp_path.iterdir()) == []  # nothing was put into the folders that were made
    with pytest.raises(InputError, match="expected a folder"), run_lock(Path(__file__)):
        pass
