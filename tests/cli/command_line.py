"""The command line called in this process, as a script would."""

from __future__ import annotations

from typing import Any

import pytest

from evermind_pack.cli import main


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of `evermind-pack ARGUMENTS`."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
