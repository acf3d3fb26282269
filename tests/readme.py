"""Run the README's commands and programs as they stand, in order, in the project's folder.

    python tests/readme.py

`make test` is left out: it is what calls for this, and the installation: it has been done.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DONE_ALREADY = ("make test", "python3 -m venv", ".venv/bin/pip install", ". .venv/")


def main() -> int:
    blocks = _BLOCK.findall((ROOT / "README.md").read_text())
    assert blocks, "the README has no commands"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, text in blocks:
        if language == "python":
            run(["python", "-c", text], "the README's program", environment)
            continue
        for line in text.splitlines():
            if line.strip() and not line.startswith(_DONE_ALREADY):
                run(["bash", "-euc", line], line, environment)
    print("README: every command ran")
    return 0


def run(command: list[str], shown: str, environment: dict[str, str]) -> None:
    print(f"README $ {shown}", flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())
