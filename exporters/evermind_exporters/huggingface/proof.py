"""A finished package compared with transformers' logits, in a process that has only the runtime.

What traced the model keeps hundreds of megabytes for the life of its process; beside them the
package's own memory would be the peak of an import.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from evermind_manifests.errors import ContentError, ExportError
from evermind_manifests.manifest import Half

from .emulation import emulate

_PROGRAM = f"from {__name__} import main; main()"


def parity_error(folder: Path) -> float:
    """How far the package in `folder` is off, relative to the largest logit.

    Raises `ContentError` if that is too far or its graphs cannot be run, `ExportError` if the
    process that compares ended without a result or could not read: that says nothing of it.
    """
    return _compared(os.fspath(folder))


def half_error(folder: Path, compute: Half) -> float:
    """The same of the package's variant `compute`: `evermind_runtime.parity.typical_error`.

    ONNX Runtime's CPU provider runs float16; of bfloat16, `emulation.py` makes graphs that it runs.
    """
    if compute != "bf16":
        return _compared(os.fspath(folder), compute)
    with tempfile.TemporaryDirectory() as emulated:
        emulate(folder, compute, Path(emulated))
        return _compared(os.fspath(folder), compute, emulated)


def _compared(*arguments: str) -> float:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode < 0:
        name = _signal_name(-result.returncode)
        why = ", probably by lack of memory" if name == "SIGKILL" else ""
        raise ExportError(
            f"the package cannot be compared with transformers: the process was killed ({name})"
            f"{why}",
            hint="Close other programs, or import on a machine with more memory." if why else None,
        )
    if result.returncode:
        last = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        raise ExportError(f"the package cannot be compared with transformers: {last}")
    found = json.loads(result.stdout.splitlines()[-1])
    if found["problem"] is not None:
        if not found["wrong"]:
            raise ExportError(
                f"the package cannot be compared with transformers: {found['problem']}"
            )
        raise ContentError(
            "the package does not compute what transformers does, so this model cannot be "
            f"imported: {found['problem']}"
        )
    return float(found["error"])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


def main() -> None:
    """Print, as JSON, what is found for the folder in the arguments.

    They may go on with a variant, and with a folder of the graphs that stand in for its own.
    """
    from evermind_manifests.package import open_package
    from evermind_runtime.parity import compare_parity, compare_variant

    from .emulation import Emulated

    folder, *more = sys.argv[1:]
    with open_package(Path(folder)) as package:
        compute = next((one for one in package.manifest.variants if one in more), None)
        if compute is None:
            found = compare_parity(package)
        elif len(more) == 1:
            found = compare_variant(package, compute)
        else:
            emulated = Emulated(package, compute, Path(more[1]))
            bound = package.manifest.variants[compute].tolerance
            found = compare_parity(emulated, half_tolerance=bound)
    problem = found.problems[0].message if found.problems else None
    # Files that cannot be read back say something of the disk, not of what was written.
    wrong = any(one.code == "parity" for one in found.problems)
    print(json.dumps({"problem": problem, "wrong": wrong, "error": found.error}))
