"""Examples that finish in a few seconds run, as they stand or at a small size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["tokitai_classifier.py"], ["loss "]),
        (["tilelli_bytes.py", "--steps", "20"], ["step 20: loss ", "times less than f16"]),
        (
            ["synapse_language_model.py", "--steps", "8", str(ROOT / "README.md")],
            ["valid: True (checked: structure, files, deep, run)", "layer 1: balance"],
        ),
    ],
)
def test_an_example_runs(command: list[str], shown: list[str], tmp_path: Path) -> None:
    name, *arguments = command
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in shown:
        assert text in done.stdout
