"""Rerunnable measurements; BENCHMARKS.md holds what they gave. Not part of the wheel."""
