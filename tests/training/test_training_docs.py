"""The programs and commands of docs/training.md, run as they stand there."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from pathlib import Path

from evermind_pack.cli import main
from evermind_pack.training import PeerMixedTrainer

DOCS = Path(__file__).parent.parent.parent / "docs"
TEXT = (DOCS / "training.md").read_text("utf-8")


def test_every_program_works(capsys):
    names: dict[str, object] = {}
    for program in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(program, names)
    assert names["report"].step == 1
    assert isinstance(names["mixed"], PeerMixedTrainer)
    assert all(math.isfinite(loss) for loss in names["losses"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_every_command_works(tmp_path, monkeypatch, capsys):
    shutil.copytree(DOCS, tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).splitlines()
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "evermind-pack"
        assert main(arguments) == 0, capsys.readouterr().err
    assert Path("package/manifest.json").is_file()
    for name in ("config.json", "model.safetensors", "metrics.jsonl", "checkpoint-00000006"):
        assert Path("runs/docs", name).exists()
