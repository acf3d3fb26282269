"""A limit on the memory of the processes that are measured, page cache included.

The kernel enforces it, and chooses what to evict. Either in a memory cgroup (version 1 or 2):
EVERMIND_BENCH_CGROUP names an empty one that this user may write to. Or, where
EVERMIND_BENCH_BALLOON is set, by a process that locks all other memory of the machine
(`balloon.py`): for root, on a machine that does nothing else. Without either nothing is held to
a limit, and a benchmark says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .balloon import LET_GO
from .common import MIB, ROOT

CGROUP_VARIABLE = "EVERMIND_BENCH_CGROUP"
BALLOON_VARIABLE = "EVERMIND_BENCH_BALLOON"
UNHELD = "nothing"
HOW = f"name a memory cgroup in {CGROUP_VARIABLE}, or as root set {BALLOON_VARIABLE}=1"


class Held:
    """A limit in force; `by` says what holds it and, once it has ended, what was used at most."""

    def __init__(self, by: str, join: Callable[[int], None] = lambda process: None) -> None:
        self.by = by
        #: Takes a process in, by its id: from now on it counts.
        self.join = join


@contextmanager
def held(limit: int) -> Iterator[Held]:
    """Within, processes that join have `limit` bytes of memory, files they read included.

    A balloon counts what all processes use beside what they have now. Raises `OSError` where
    there is no such cgroup, `RuntimeError` where the balloon could not hold the limit.
    """
    if cgroup := os.environ.get(CGROUP_VARIABLE):
        folder = bounded_cgroup(Path(cgroup), limit)
        yield Held("a cgroup", lambda process: _join(folder, process))
    elif os.environ.get(BALLOON_VARIABLE):
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.balloon"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None

            def ask(what: str) -> str:
                # Of one that has ended the last word is still to be read.
                with suppress(BrokenPipeError):
                    os.write(process.stdin.fileno(), f"{what}\n".encode())
                return process.stdout.readline().strip()

            try:
                if ask(str(limit)) != "held":
                    raise RuntimeError("the balloon holds no limit: is there swap, or no root?")
                found = Held("a balloon")
                yield found
                answer = ask("end")
                if not answer.isdecimal():
                    raise RuntimeError(
                        f"the limit of {limit / MIB:,.0f} MiB did not hold: "
                        + ("processes need more" if answer == LET_GO else "the balloon ended")
                    )
                found.by += f" ({int(answer) / MIB:,.0f} MiB used at most)"
            finally:
                process.kill()
    else:
        yield Held(UNHELD)


def bounded_cgroup(folder: Path, limit: int) -> Path:
    """Bound a cgroup's memory. Raises `OSError` if it is none."""
    names = ("memory.max", "memory.limit_in_bytes")
    control = next((folder / name for name in names if (folder / name).exists()), None)
    if control is None:
        raise OSError(f"{CGROUP_VARIABLE}: {folder} is no memory cgroup: it has none of {names}")
    control.write_text(str(limit))
    return folder


def _join(folder: Path, process: int) -> None:
    (folder / "cgroup.procs").write_text(str(process))
