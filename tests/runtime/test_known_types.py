"""What readers convert to is known to msgspec before threads meet it: see shard.py.

Two threads that convert to a new type at once have crashed the process (msgspec 0.22).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, threading, warnings
import evermind_runtime as em
import evermind_runtime.parity

met = []
def profile(frame, event, arg):
    if event == "call" and frame.f_code.co_name == "get_class_annotations":
        met.append(frame.f_locals.get("obj"))
threading.setprofile(profile)
sys.setprofile(profile)
warnings.simplefilter("ignore")
with em.load(sys.argv[1], budget="50%") as model:
    model.forward({"tokens": [1, 2, 3]})
sys.setprofile(None)
print(met)
"""


def test_no_type_is_new_when_experts_are_read(lm_package: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(lm_package)], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
