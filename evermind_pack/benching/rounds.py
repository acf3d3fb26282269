"""Rounds of every budget in turn, each in a fresh process, so that what else the machine does
falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping

import msgspec
from evermind_manifests import errors
from evermind_manifests.errors import EvermindPackError

from .job import Failure, Job, Round, to_line

_DYING_SECONDS = 10.0


def run_rounds(
    jobs: Mapping[str, Job],
    rounds: int,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, list[Round]]:
    """`rounds` rounds of each job, by its name; each round begins with another one.

    Round r samples with seed + 2r. Raises what a round raised, and `EvermindPackError` for
    one that died. Whatever ends this ends the process that runs: none is left behind.
    """
    results: dict[str, list[Round]] = {name: [] for name in jobs}
    names = list(jobs)
    done = 0
    for number in range(rounds):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            progress(done, rounds * len(names))
            job = jobs[name]
            results[name].append(
                _run(name, msgspec.structs.replace(job, seed=job.seed + 2 * number))
            )
            done += 1
    progress(done, done)
    return results


def _run(name: str, job: Job) -> Round:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.round"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(to_line(job))
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer.endswith(b"\n"):
                process.wait(_DYING_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            answer = b""
        finally:
            # After its answer a round has nothing left to do; interrupted, it is not wanted.
            process.kill()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        said.seek(0)
        return _parse(
            name, answer, said.read().decode(errors="replace").strip(), process.returncode
        )


def _parse(name: str, answer: bytes, said: str, code: int) -> Round:
    if not answer.endswith(b"\n"):
        reason = f"signal {-code}" if code < 0 else f"code {code}"
        last = said.splitlines()[-1] if said else "it said nothing"
        raise EvermindPackError(
            f"budget {name}: the process that ran it ended with {reason}: {last[:300]}",
            hint="If it was killed for its memory, leave out the largest budgets."
            if code < 0 or "MemoryError" in said
            else None,
        )
    values = json.loads(answer)
    if "type" in values:
        failure = msgspec.convert(values, Failure)
        kind = getattr(errors, failure.type, EvermindPackError)
        if kind is errors.MissingExtraError:  # it makes its message itself
            kind = errors.DeviceError
        error: EvermindPackError = kind(failure.message, hint=failure.hint)
        raise error
    return msgspec.convert(values, Round)
