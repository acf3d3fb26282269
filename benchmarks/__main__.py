"""Run every benchmark and write what it found into BENCHMARKS.md, between its markers.

    python -m benchmarks [NAME …] [--quick] [--json FILE]

About twenty minutes on a quiet machine with 2 cores; two minutes are the npm peer's, six those of
`huggingface`. `--quick` runs each for seconds to see that it works, and writes nothing.
Memory limits are enforced where `memory_limit.py` is told how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .common import ROOT, Report, as_markdown, as_text, machine, report_of
from .cores import round_trip_ns

NAMES = (
    "language_model",
    "large_experts",
    "limited",
    "prefill",
    "half_precision",
    "policies",
    "memory",
    "opening",
    "network",
    "export",
    "scaling",
    "tokitai",
    "synapse",
    "huggingface",
    "import_",
    "context",
)
NOTEBOOK = ROOT / "BENCHMARKS.md"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="seconds each; writes nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all reports there too")
    options = parser.parse_args()
    names = options.names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"expected some of {', '.join(NAMES)}, found {', '.join(unknown)}")
    described = machine()
    print("\n".join(f"{name}: {value}" for name, value in described))
    reports: dict[str, Report] = {}
    for name in names:
        started, apart = time.perf_counter(), [round_trip_ns()]
        report = _run(name, quick=options.quick)
        apart.append(round_trip_ns())
        print(f"\n== {name}, {time.perf_counter() - started:.0f} s\n", flush=True)
        if report is None:
            continue
        reports[name] = report
        print(as_text(report), flush=True)
        if not options.quick:
            _write(name, report, described, apart)
    if options.json:
        found = {name: asdict(report) for name, report in reports.items()}
        options.json.write_text(json.dumps({"machine": dict(described), **found}, indent=1))
    return 0 if len(reports) == len(names) else 1


def _run(name: str, *, quick: bool) -> Report | None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *(["--quick"] * quick)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        print(f"{name}: failed with exit code {result.returncode}", file=sys.stderr)
        return None
    return report_of(json.loads(result.stdout.splitlines()[-1]))


def _write(
    name: str, report: Report, described: list[tuple[str, str]], apart: list[float | None]
) -> None:
    """At once, so that a run that is stopped keeps what it found."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    today = datetime.date.today().isoformat()
    head = f"`python -m benchmarks.{name}`, {today}"
    if known := [f"{ns:.0f} ns" for ns in apart if ns is not None]:
        head += f"; from core to core and back {' before, '.join(known)} after"
    text = with_block(text, name, f"{head}\n\n{as_markdown(report)}")
    facts = "\n".join(f"- {name}: {value}" for name, value in described)
    NOTEBOOK.write_text(with_block(text, "machine", facts), encoding="utf-8")


def with_block(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced.

    Raises `ValueError` if they are not there once.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"BENCHMARKS.md: expected one {begin} … {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


if __name__ == "__main__":
    sys.exit(main())
