"""`export` and `convert` between the peer's files and packages, as a script calls them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from evermind_pack.cli import main
from tests.packages import GOLDEN

LM = GOLDEN / "lm_small"
MEDIA = GOLDEN / "pkg_media" / "model.evermind"


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    code, _, err = call(
        capsys, "export", LM / "lm.v1.bin", "-o", tmp_path / "lm", "--dtype", "f32", "-q"
    )
    assert code == 0, err
    return tmp_path / "lm"


def test_there_and_back(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "again.evl0"
    code, text, _ = call(capsys, "convert", package, "-o", out, "--to", "evl0", "--json")
    assert code == 0
    result = json.loads(text)
    assert result["bytes"] == len(out.read_bytes())
    assert result["format"] == "evl0"
    assert result["sha256"] == {out.name: hashlib.sha256(out.read_bytes()).hexdigest()}
    assert out.read_bytes() == (LM / "lm.v1.bin").read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--fp16", "--fp16-rounding", "truncate"], "lm.v2.bin"),
        (["--no-trailer"], "lm.v1.legacy.bin"),
        (["--f32"], "lm.v1.bin"),
    ],
)
def test_options_choose_the_golden_file(
    package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    expected: str,
) -> None:
    out = tmp_path / "out"
    code, text, err = call(capsys, "convert", package, "-o", out, "--to", "evl0", "-q", *options)
    assert (code, text, err) == (0, "", "")
    assert out.read_bytes() == (LM / expected).read_bytes()


def test_a_media_file_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, out = tmp_path / "package.zip", tmp_path / "out.evermind"
    assert call(capsys, "export", MEDIA, "-o", package, "-q")[0] == 0
    assert call(capsys, "convert", package, "-o", out, "--to", "evermind")[0] == 0
    assert out.read_bytes() == MEDIA.read_bytes()


def test_a_bundle_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, bundle = tmp_path / "package", tmp_path / "bundle"
    command = ("export", GOLDEN / "export_lm", "-o", package, "--dtype", "f32", "-q")
    assert call(capsys, *command)[0] == 0
    code, text, _ = call(capsys, "convert", package, "-o", bundle, "--to", "hf", "--json")
    assert code == 0
    assert sorted(json.loads(text)["sha256"]) == sorted(path.name for path in bundle.iterdir())
    again = ("export", bundle, "-o", tmp_path / "again", "--dtype", "f32", "--name", "export_lm")
    assert call(capsys, *again, "-q")[0] == 0
    assert (tmp_path / "again/manifest.json").read_bytes() == (
        package / "manifest.json"
    ).read_bytes()


def test_a_file_is_replaced_only_with_force(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    command = ("convert", package, "-o", out, "--to", "evl0")
    code, _, err = call(capsys, *command)
    assert code == 1
    assert "exists already" in err
    assert out.read_bytes() == b"precious"
    assert call(capsys, *command, "--force")[0] == 0
    assert out.read_bytes() == (LM / "lm.v1.bin").read_bytes()


def test_what_cannot_be_is_refused(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, _, err = call(capsys, "convert", package, "-o", out, "--to", "moe0")
    assert code == 2
    assert "It fits: evl0, evermind, safetensors, gguf." in err
    code, text, _ = call(
        capsys, "convert", package, "-o", out, "--to", "safetensors", "--no-trailer", "--json"
    )
    assert code == 2
    assert json.loads(text)["error"]["type"] == "InputError"
    assert not out.exists()


def test_a_tokenizer_from_the_peers_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((GOLDEN / "tokenizer" / name).read_bytes())
    command = ("-o", tmp_path / "p", "--tokenizer", tmp_path, "--json")
    assert call(capsys, "export", GOLDEN / "pkg_lm_f32/model.evermind", *command)[0] == 0
    code, text, _ = call(capsys, "inspect", tmp_path / "p", "--json")
    assert code == 0
    assert json.loads(text)["tokenizer"] == "tokenizers"
    code, text, _ = call(capsys, "export", GOLDEN / "moe_small/moe.v1.bin", *command, "--force")
    assert code == 1
    assert "no use for a tokenizer" in json.loads(text)["error"]["message"]
