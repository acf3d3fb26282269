"""Benchmarks of a package: rounds in fresh processes, and what their figures amount to."""

from __future__ import annotations

from .job import Job, Round
from .report import Report, report
from .rounds import run_rounds

__all__ = ["Job", "Report", "Round", "report", "run_rounds"]
