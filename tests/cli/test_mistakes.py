"""Mistakes on the command line: one line that names them and an exit code, never a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_runtime.trace import read_trace

from tests.cli.command_line import call
from tests.packages import export, golden_source, lm_source

SURROGATE = "\udcff"  # what the shell's $'\xff' becomes


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lm_source(), tmp_path_factory.mktemp("mistakes") / "lm")


@pytest.fixture
def bytes_package(tmp_path: Path) -> Path:
    """A package whose tokens are bytes."""
    from tests.packages import LM_CONFIG, random_source

    config = {**LM_CONFIG, "vocabSize": 256, "numLayers": 1}
    return export(random_source("evermind-lm", config, tokenizer="bytes"), tmp_path / "bytes")


def commands(place: Any, tmp_path: Path) -> list[list[Any]]:
    """Every command that reads a model, with `place` for the model."""
    return [
        ["run", place, "--tokens", "1"],
        ["inspect", place],
        ["validate", place],
        ["export", place, "-o", tmp_path / "new"],
        ["convert", place, "-o", tmp_path / "new", "--to", "evl0"],
        ["trace", place, "--tokens", "1", "-o", tmp_path / "new"],
        ["plan", place],
        ["bench", place],
    ]


@pytest.mark.parametrize("name", ["nowhere", "n" * 5000, "n" * 300, "a\nb", SURROGATE])
def test_a_place_that_is_not_there_is_a_mistake_of_usage(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    for command in commands(tmp_path / name, tmp_path):
        code, out, err = call(capsys, *command)
        assert (command[0], code, out) == (command[0], 2, "")
        assert str(tmp_path)[:50] in err
        assert len(err) < 1500


def test_a_folder_that_is_no_package_is_named(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for command in commands(folder, tmp_path):
        code, out, err = call(capsys, *command)
        # `plan` takes folders of two kinds: that it is neither is a mistake of usage.
        assert (command[0], code) == (command[0], 2 if command[0] == "plan" else 1)
        assert str(folder) in out + err


def test_a_manifest_that_is_too_large_is_one_mistake(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "huge"
    folder.mkdir()
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**31)
    for command in commands(folder, tmp_path):
        if command[0] != "export":  # does not read packages
            code, out, err = call(capsys, *command)
            assert (command[0], code) == (command[0], 1)
            assert str(folder) in out + err


def test_validate_run_reports_what_it_cannot_run(tmp_path: Path, capsys: Any) -> None:
    package = export(golden_source("lm_small"), tmp_path / "lm", parity=True)
    graph = next(iter(sorted(package.glob("graphs/*"))))
    data = graph.read_bytes()
    graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (package / "stray.json").write_text("{}")
    code, out, _ = call(capsys, "validate", package, "--run", "--json")
    report = json.loads(out)
    assert code == report["exit_code"] == 3
    assert {item["code"] for item in report["problems"]} == {"stray-file", "digest-mismatch"}
    assert report["levels"] == ["structure", "files", "run"]


def test_no_parity_file_fails_the_run_level_only(package: Path, capsys: Any) -> None:
    code, out, _ = call(capsys, "validate", package, "--deep")
    assert code == 0
    assert "warning[no-parity]" in out
    code, out, _ = call(capsys, "validate", package, "--run", "--json")
    report = json.loads(out)
    assert code == 1
    assert {(item["code"], item["severity"]) for item in report["problems"]} == {
        ("no-parity", "warning"),
        ("parity", "error"),
    }


def _single(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def _claims_too_much(path: Path) -> None:
    header = io.BytesIO()
    with zipfile.ZipFile(path, "w") as archive:
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)}
        )
        archive.writestr("tokens.npy", header.getvalue())


def _objects(path: Path) -> None:
    np.savez(path, tokens=np.array([{}], dtype=object))


def _damaged(path: Path) -> None:
    np.savez_compressed(path, tokens=np.arange(1000))
    data = bytearray(path.read_bytes())
    data[60:200] = bytes(140)
    path.write_bytes(data)


def _text(path: Path) -> None:
    path.write_text("tokens")


@pytest.mark.parametrize("option", ["--inputs", "--state-in"])
@pytest.mark.parametrize("make", [_single, _claims_too_much, _objects, _damaged, _text])
def test_arrays_that_cannot_be_read(
    make: Any, option: str, package: Path, tmp_path: Path, capsys: Any
) -> None:
    make(tmp_path / "bad.npz")
    np.savez(tmp_path / "in.npz", tokens=[1])
    given = {"--inputs": tmp_path / "in.npz"} | {option: tmp_path / "bad.npz"}
    arguments = [word for pair in given.items() for word in pair]
    code, out, err = call(capsys, "run", package, *arguments, "--outputs", tmp_path / "o.npz")
    assert (code, out) == (2, "")
    assert "bad.npz" in err
    assert "unsafe" not in err


@pytest.mark.parametrize("name", ["missing.npz", "n" * 5000, ""])
def test_arrays_that_are_not_there(name: str, package: Path, tmp_path: Path, capsys: Any) -> None:
    inputs = ["--inputs", tmp_path / name, "--outputs", tmp_path / "o.npz"]
    code, out, err = call(capsys, "run", package, *inputs)
    assert (code, out) == (2, "")
    assert "cannot be read as .npz" in err


def test_text_that_is_no_unicode_is_refused(
    bytes_package: Path, tmp_path: Path, capsys: Any
) -> None:
    prompt = ["--prompt", f"a{SURROGATE}", "--max-new", 1]
    assert call(capsys, "run", bytes_package, *prompt[:1], "añ", *prompt[2:])[0] == 0
    code, out, err = call(capsys, "run", bytes_package, *prompt)
    assert (code, out) == (2, "")
    assert "prompt" in err
    from tests.packages import GOLDEN

    source = GOLDEN / "lm_small" / "lm.v1.bin"
    for option in (
        "--name",
        "--package-version",
        "--license",
        "--author",
        "--description",
        "--tag",
    ):
        command = ["export", source, "-o", tmp_path / "new", option, SURROGATE]
        code, out, err = call(capsys, *command)
        assert (option, code, out) == (option, 2, "")
        assert option in err
        assert not (tmp_path / "new").exists()
    nameless = tmp_path / SURROGATE
    nameless.write_bytes(source.read_bytes())
    code, _, err = call(capsys, "export", nameless, "-o", tmp_path / "new")
    assert code == 2
    assert "--name" in err
    assert call(capsys, "export", nameless, "-o", tmp_path / "new", "--name", "n")[0] == 0


def test_a_hugging_face_tokenizer_refuses_it_too() -> None:
    from evermind_manifests.errors import InputError
    from evermind_runtime.tokenizer import HuggingFaceCodec

    from tests.packages import GOLDEN

    codec = HuggingFaceCodec((GOLDEN / "tokenizer" / "tokenizer.json").read_bytes(), "t")
    assert codec.encode("añ")
    with pytest.raises(InputError, match="prompt"):
        codec.encode(f"a{SURROGATE}")


@pytest.mark.parametrize("ids", ["1,,2", "1,", ",", "1.0", "true", "1_0", "0x1", "9" * 5000])
def test_token_ids_are_whole_numbers(ids: str, package: Path, capsys: Any) -> None:
    code, out, err = call(capsys, "run", package, "--tokens", ids)
    assert (code, out) == (2, "")
    assert "expected ids like 1,2,3" in err
    assert len(err) < 500


@pytest.mark.parametrize("steps", ["decode", "prefill"])
def test_steps_without_arrays_are_refused(steps: str, package: Path, capsys: Any) -> None:
    code, _, err = call(capsys, "run", package, "--tokens", "1", "--steps", steps)
    assert code == 2
    assert "--steps has no meaning without --inputs" in err


def test_existing_targets_name_force(package: Path, tmp_path: Path, capsys: Any) -> None:
    from tests.packages import GOLDEN

    export_again = ["export", GOLDEN / "lm_small" / "lm.v1.bin", "-o", tmp_path / "p"]
    convert_again = ["convert", package, "-o", tmp_path / "f", "--to", "evl0"]
    for command in (export_again, convert_again):
        assert call(capsys, *command)[0] == 0
        code, _, err = call(capsys, *command)
        assert code == 1
        assert "--force" in err
        assert call(capsys, *command, "--force")[0] == 0


def test_force_is_not_ignored_for_a_folder(package: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["convert", package, "-o", tmp_path / "hf", "--to", "hf", "--force"]
    code, _, err = call(capsys, *command)
    assert code == 2
    assert "--force has no meaning with --to hf" in err


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_what_the_system_refuses_is_one_line(
    as_json: list[str], package: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("evermind_pack.cli.inspect.summarize", broken)
    code, out, err = call(capsys, "inspect", package, *as_json)
    assert code == 1
    said = json.loads(out)["error"]["message"] if as_json else err
    assert "Input/output error" in said
    assert "Traceback" not in err


def _python(script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        timeout=120,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_interrupt_while_a_command_is_imported_is_no_traceback(package: Path) -> None:
    script = f"""
import importlib, os, sys
from evermind_pack.cli import main
def slow(name):
    os.kill(os.getpid(), {signal.SIGINT.value})
    raise AssertionError("not interrupted")
importlib.import_module = slow
sys.exit(main(sys.argv[1:]))
"""
    result = _python(script, "inspect", package)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_a_terminal_of_ascii_shows_what_it_can(bytes_package: Path, tmp_path: Path) -> None:
    script = "import sys; from evermind_pack.cli import main; sys.exit(main(sys.argv[1:]))"
    moved = bytes_package.rename(tmp_path / "modèle")
    for more in ([], ["--json"]):
        arguments = ["--prompt", "é", "--max-new", 4, *more]
        result = _python(script, "run", moved, *arguments, PYTHONIOENCODING="ascii")
        assert (result.returncode, "Traceback" in result.stderr) == (0, False)
        assert result.stdout.isascii()
        if more:
            assert len(json.loads(result.stdout)["tokens"]) == 4


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_full_disk_under_stdout_is_one_line(as_json: list[str], package: Path) -> None:
    """Buffered output fails only when it is flushed, which must not be left to the exit."""
    script = """
import io, sys
class Full(io.RawIOBase):
    def writable(self): return True
    def write(self, data): raise OSError(28, "No space left on device")
sys.stdout = io.TextIOWrapper(io.BufferedWriter(Full()))
from evermind_pack.cli import main
code = main(sys.argv[1:])
import os
os._exit(code)
"""
    result = _python(script, "inspect", package, *as_json)
    assert result.returncode == 1
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_written_to_by_nobody(closed: str, package: Path) -> None:
    script = f'exec "$0" -m evermind_pack run "$1" --tokens 1 --max-new 2 {closed}'
    command = ["sh", "-c", script, sys.executable, str(package)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert bool(result.stdout) == closed.startswith("2")


def test_an_error_begins_a_line_of_its_own(package: Path, tmp_path: Path, capsys: Any) -> None:
    """Tokens were shown before one needed an expert that is not there."""
    torn = tmp_path / "torn"
    shutil.copytree(package, torn)
    with em.load(torn, plan="half") as model:
        model.trace(tmp_path / "first.jsonl")
        (first,) = model.generate([1], max_new_tokens=1, temperature=0.0)
        shards = model.manifest.shards
    steps = read_trace(tmp_path / "first.jsonl").steps
    used = {(step.layer, expert) for step in steps for row in step.tokens for expert in row}
    for shard in shards:
        if (shard.layer, shard.expert) not in used:
            (torn / shard.file).unlink()
    options = ("--tokens", "1", "--temperature", "0", "--max-new", "32", "--plan", "half")
    code, out, err = call(capsys, "run", torn, *options)
    assert code == 3
    assert out.startswith(f"{first.token} ")
    assert out.endswith(" \n")
    assert err.startswith("MissingFileError: experts/")
    assert "`evermind-pack validate` lists all that is missing" in err


def test_a_manifest_given_for_its_package_is_told(package: Path, capsys: Any) -> None:
    code, _, err = call(capsys, "run", package / "manifest.json", "--tokens", "1")
    assert code == 1
    assert "Give the folder that it lies in" in err


@pytest.mark.parametrize("count", ["x", "0", "-1", "1.5", "9" * 5000])
def test_a_count_is_a_whole_number(count: str, package: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        call(capsys, "bench", package, f"--rounds={count}")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "argument --rounds: expected a whole number, 1 or more, found" in said
    assert len(said) < 2000
