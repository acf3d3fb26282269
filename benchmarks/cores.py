"""How far apart the cores are: what two threads that share work wait for, again and again.

On a virtual machine it changes while it runs, as the host moves virtual cores about: between
those that share a cache and others. Two threads may run at half their speed for minutes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

_ROUNDS = 100_000
_TRIES = 3


def round_trip_ns() -> float | None:
    """The least nanoseconds until the second usable core has answered the first.

    None with one core, or without a C compiler.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "core_latency.so"
        source = Path(__file__).with_name("core_latency.c")
        command = ["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        call = ctypes.CDLL(str(library)).round_trip
    call.restype, call.argtypes = ctypes.c_double, (ctypes.c_int, ctypes.c_int, ctypes.c_long)
    least = min(call(cores[0], cores[1], _ROUNDS) for _ in range(_TRIES))
    return least if least > 0 else None
