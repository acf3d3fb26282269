"""The commands of docs/peer.md, run as they stand there."""

from __future__ import annotations

import filecmp
import re
import shlex
import shutil
from pathlib import Path

import pytest

from evermind_pack.cli import main
from tests.packages import GOLDEN

DOCS = Path(__file__).parent.parent.parent / "docs" / "peer.md"


def test_every_command_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDEN / "pkg_lm_f32" / "model.evermind", "model.evermind")
    shutil.copytree(GOLDEN / "tokenizer", "tokenizer")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)).splitlines()
    commands = [shlex.split(line) for line in lines if line]
    assert len(commands) > 8
    for command in commands:
        if command[0] == "cmp":
            assert filecmp.cmp(command[1], command[2], shallow=False), command
        else:
            assert command[0] == "evermind-pack"
            assert main(command[1:]) == 0, (command, capsys.readouterr().err)
    golden_half = GOLDEN / "pkg_lm_fp16" / "model.evermind"
    assert filecmp.cmp("half.evermind", golden_half, shallow=False)
