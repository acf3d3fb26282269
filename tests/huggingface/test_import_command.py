"""The `import` command from a checkpoint to text, as a user calls it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from evermind_manifests.writer import PackageWriter
from safetensors.numpy import load_file, save_file

from evermind_pack.cli import main
from tests.cli.command_line import call

from .conftest import Imported

pytest.importorskip("transformers")
VOCABULARY = 96


class Run(NamedTuple):
    code: int
    out: str
    err: str
    package: Path


def write_tokenizer(folder: Path) -> None:
    """Words w3 to w95; a space between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]
    model = models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def checkpoint(
    imported: Callable[[str], Imported], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny-olmoe"
    shutil.copytree(imported("olmoe").checkpoint, folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def done(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    package = tmp_path_factory.mktemp("imported") / "olmoe"
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["import", str(checkpoint), "-o", str(package), "--license", "MIT", "--json"])
    return Run(code, out.getvalue(), err.getvalue(), package)


def test_the_result_says_what_was_written(done: Run) -> None:
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    files = [path for path in done.package.rglob("*") if path.is_file()]
    experts = sum(path.stat().st_size for path in files if path.suffix == ".moe0")
    assert 0 < result["parity_error"] <= 5e-5
    assert result["seconds"] > 0
    assert {key: result[key] for key in ("package", "architecture", "family", "parity")} == {
        "package": str(done.package),
        "architecture": "olmoe",
        "family": "huggingface/olmoe",
        "parity": True,
    }
    assert (result["experts"], result["expert_bytes"]) == (16, experts)
    manifest = (done.package / "manifest.json").stat().st_size
    assert result["bytes"] == sum(path.stat().st_size for path in files) - manifest


def test_inspect_and_validate_know_the_package(done: Run, capsys: Any) -> None:
    code, out, _ = call(capsys, "inspect", done.package, "--json")
    summary = json.loads(out)
    assert (code, summary["digest"]) == (0, json.loads(done.out)["digest"])
    assert (summary["name"], summary["tokenizer"]) == ("tiny-olmoe", "tokenizers")
    assert summary["config"]["model_type"] == "olmoe"
    code, out, _ = call(capsys, "validate", done.package, "--deep", "--run", "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])


@pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")
def test_run_pages_a_quarter_and_gives_what_transformers_does(
    done: Run, imported: Callable[[str], Imported], capsys: Any
) -> None:
    import torch

    prompt = [5, 17, 80, 3]
    model = imported("olmoe").model
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )[0].tolist()[len(prompt) :]
    greedy = ("--max-new", 12, "--budget", "25%", "--temperature", 0, "--json")
    text = " ".join(f"w{token}" for token in prompt)
    for what in (("--tokens", ",".join(map(str, prompt))), ("--prompt", text)):
        code, out, _ = call(capsys, "run", done.package, *what, *greedy)
        result = json.loads(out)
        stop = result["tokens"].index(2) if 2 in result["tokens"] else 12
        assert (code, result["tokens"][:stop]) == (0, expected[:stop])
        assert stop > 3
        assert result["expert_misses"] > 0
        assert result["peak_resident_expert_bytes"] <= json.loads(done.out)["expert_bytes"] / 4
        assert "w" in result["text"]


def test_stages_are_told_on_stderr_and_q_is_silent(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evermind_exporters.huggingface import import_

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_, "trace", interrupt)
    code, out, err = call(capsys, "import", checkpoint, "-o", tmp_path / "p")
    assert (code, out) == (130, "")
    assert err == "reading the checkpoint\ntracing the model\ninterrupted\n"
    assert list(tmp_path.iterdir()) == []
    code, out, err = call(capsys, "import", checkpoint, "-o", tmp_path / "p", "-q")
    assert (code, out, err) == (130, "", "interrupted\n")


# Imports, and is killed when it is about to write the sixth expert.
KILLED = """
import os, signal, sys
from evermind_manifests import writer
from evermind_pack.cli import main

original = writer.PackageWriter.stream_shard
written = []

def stream_shard(self, *args):
    if len(written) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(args[:2])
    original(self, *args)

writer.PackageWriter.stream_shard = stream_shard
writer.JOURNAL_BYTES = 1
main(["import", *sys.argv[1:]])
"""


def test_an_import_that_is_cut_off_goes_on(
    checkpoint: Path, done: Run, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, refused with other options, interrupted, finished: the package is the same."""
    command = ["import", checkpoint, "-o", tmp_path / "p", "--license", "MIT"]
    arguments = list(map(str, command[1:]))
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".p.partial"]
    code, _, err = call(capsys, *command, "--dtype", "f16", "-q")
    assert (code, "differs in dtype (then keep, now f16)" in err) == (1, True)
    assert "--restart to start anew" in err

    written = []
    stream_shard = PackageWriter.stream_shard

    def three(self: PackageWriter, *args: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(args[:2])
        stream_shard(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
        code, _, err = call(capsys, *command)
    assert (code, "the disk is too full" in err) == (1, True)
    assert "5 experts are kept in .p.partial: the same command goes on from there" in err
    with monkeypatch.context() as patched:
        patched.setattr(PackageWriter, "stream_shard", three)
        code, _, err = call(capsys, *command)
    assert code == 130
    assert "checking 5 experts that are there already" in err
    assert "8 experts (" in err
    assert "are kept in " in err
    assert f"{tmp_path / '.p.partial'}: the same command goes on from there" in err
    code, out, err = call(capsys, *command, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["digest"] == json.loads(done.out)["digest"]
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_help_has_examples(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["import", "--help"])
    assert ended.value.code == 0
    assert "examples:\n  evermind-pack plan ./OLMoE-1B-7B " in capsys.readouterr().out


def damage_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8] = ord("[")
    file.write_bytes(data)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def lose_a_file(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mix_dtypes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def write_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (damage_header, "CheckpointError", "model.safetensors: not a safetensors file"),
        (cut_short, "CheckpointError", "the file at"),
        (lose_a_file, "CheckpointError", "model-00001-of-00002.safetensors: missing"),
        (mix_dtypes, "UnsupportedError", "f32, f64"),
        (pickle_only, "CheckpointError", "found neither"),
        (change_config(model_type="not-known"), "UnsupportedError", "not-known"),
        (change_config(num_experts=9), "CheckpointError", "expected the tensors of 9 experts"),
        (change_config(intermediate_size=25), "CheckpointError", "shape: expected (25, 32)"),
        (change_config(quantization_config="fp8"), "CheckpointError", 'an object, found "fp8"'),
        (change_config(quantization_config=[]), "CheckpointError", "quantization_config: expected"),
        (write_config("{"), "CheckpointError", "config.json"),
        (write_config("[]"), "CheckpointError", "config.json"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_error(
    checkpoint: Path,
    tmp_path: Path,
    capsys: Any,
    spoil: Callable[[Path], None],
    kind: str,
    message: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    spoil(source)
    code, out, err = call(capsys, "import", source, "-o", tmp_path / "p", "--json")
    found = json.loads(out)["error"]
    assert (code, found["type"], err) == (1, kind, "")
    assert message in found["message"]
    assert "\n" not in found["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("name", "times"), [("p", 1), ("p.zip", 2)])
def test_a_disk_that_is_too_small_is_told_at_once(
    checkpoint: Path,
    done: Run,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    times: int,
) -> None:
    weights = json.loads(done.out)["expert_bytes"] * times
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, weights))
    code, _, err = call(capsys, "import", checkpoint, "-o", tmp_path / name)
    assert code == 1
    found = re.search(r"the disk is too full: ([\d,]+) bytes are needed, ([\d,]+) are free", err)
    assert found is not None
    needed, free = (int(one.replace(",", "")) for one in found.groups())
    assert free == weights < needed
    files = [path.stat().st_size for path in done.package.rglob("*") if path.is_file()]
    assert needed >= sum(files) * times
    assert list(tmp_path.iterdir()) == []


def test_the_disk_must_take_what_is_kept_for_the_way_back(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(source: Path) -> int:
        code, _, err = call(capsys, "import", source, "-o", tmp_path / "p")
        found = re.search(r"full: ([\d,]+) bytes are needed", err)
        assert found is not None
        assert (code, tmp_path / "p" in tmp_path.iterdir()) == (1, False)
        assert ("source.safetensors keeps" in err) == (source != checkpoint)
        return int(found[1].replace(",", ""))

    larger = tmp_path / "larger"
    shutil.copytree(checkpoint, larger)
    file = larger / "model.safetensors"
    save_file({**load_file(file), "model.unused": np.ones((300, 1000), np.float32)}, file)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert needed(larger) == needed(checkpoint) + 300 * 1000 * 4


def test_mistakes_of_usage(checkpoint: Path, done: Run, tmp_path: Path, capsys: Any) -> None:
    code, _, err = call(capsys, "import", tmp_path / "gone", "-o", tmp_path / "p")
    assert (code, "gone" in err) == (2, True)
    code, _, err = call(capsys, "import", checkpoint / "config.json", "-o", tmp_path / "p")
    assert (code, "expected a checkpoint folder" in err) == (2, True)
    with pytest.raises(SystemExit) as ended:
        main(["import", str(checkpoint), "-o", str(tmp_path / "p"), "--dtype", "int8"])
    assert ended.value.code == 2
    assert "--dtype" in capsys.readouterr().err
    before = (done.package / "manifest.json").read_bytes()
    code, _, err = call(capsys, "import", checkpoint, "-o", done.package, "-q")
    assert (code, "exists already" in err) == (1, True)
    assert (done.package / "manifest.json").read_bytes() == before
    code, _, err = call(capsys, "import", checkpoint, "-o", checkpoint, "--force", "-q")
    assert (code, "expected a package to replace" in err) == (1, True)
    code, _, err = call(capsys, "import", checkpoint, "-o", checkpoint, "-q")
    assert (code, "no package, and nothing else is ever replaced" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_where_a_package_is_expected_is_told_apart(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    for command in ("run", "inspect", "bench"):
        tokens = ["--tokens", "1"] if command == "run" else []
        code, _, err = call(capsys, command, checkpoint, *tokens)
        assert (code, "`evermind-pack import`" in err) == (1, True)
    code, _, err = call(capsys, "export", checkpoint, "-o", tmp_path / "p")
    assert (code, "`evermind-pack import` makes a package" in err) == (1, True)


def test_a_file_that_was_fetched_in_part_is_named(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    part = tmp_path / "part"
    shutil.copytree(checkpoint, part)
    os.truncate(part / "model.safetensors", 50_000)
    code, _, err = call(capsys, "import", part, "-o", tmp_path / "p", "-q")
    assert (code, err.count("model.safetensors"), "Fetch the file again" in err) == (1, 1, True)


@pytest.mark.parametrize("package", ["imported", "copied"])
def test_a_package_without_a_tokenizer_says_what_to_give(
    package: str,
    done: Run,
    imported: Callable[[str], Imported],
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one without a chat template, before it waits for a message."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    place = done.package if package == "copied" else imported("olmoe").package
    code, out, err = call(capsys, "run", place, "--chat")
    assert (code, out, "no chat template" in err) == (2, "", True)
    assert ("--prompt" if package == "copied" else "--tokens 1,2,3") in err
