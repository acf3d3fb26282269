"""Every benchmark runs, on models of seconds: what it measures decides nothing here."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from evermind_runtime.machine import page_cache

from benchmarks.__main__ import NAMES, NOTEBOOK, with_block
from benchmarks.common import MIB, as_markdown, as_text, report_of
from benchmarks.memory_limit import BESIDES, MappedFiles, ReadFiles, enforced, join_cgroup


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_reports(name: str) -> None:
    report = import_module(f"benchmarks.{name}").measure(True)
    assert report.tables
    assert report.targets
    for table in report.tables:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert report_of(json.loads(json.dumps(asdict(report)))) == report
    assert as_text(report)
    assert as_markdown(report).count("\n|") > len(report.targets)


def test_the_notebook_has_a_place_for_every_benchmark() -> None:
    text = NOTEBOOK.read_text()
    for name in (*NAMES, "machine"):
        changed = with_block(text, name, "a\\1b")
        assert f"<!-- begin {name} -->\na\\1b\n<!-- end {name} -->" in changed
    with pytest.raises(ValueError, match="expected one <!-- begin absent -->"):
        with_block(text, "absent", "")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Eight files of 1 MiB, on a disk whose pages can be dropped."""
    paths = [tmp_path / f"{number}.bin" for number in range(8)]
    for path in paths:
        path.write_bytes(bytes(MIB))
    _drop(paths)
    if _cached(paths):
        pytest.skip("pages of files cannot be dropped here")
    return paths


def test_mapped_files_are_held_to_the_limit(files: list[Path]) -> None:
    mapped = MappedFiles(dict(enumerate(files)), limit=3 * MIB)
    for key in (*range(8), 0):
        assert np.sum(mapped.use(key)) == 0
    assert mapped.take_back() == 8 * MIB
    assert mapped.take_back() == 3 * MIB
    # Those used last are left.
    assert [_cached([path]) // MIB for path in files] == [1, 0, 0, 0, 0, 0, 1, 1]


def test_nothing_of_files_that_are_read_stays(files: list[Path]) -> None:
    for path in files:
        path.read_bytes()
    assert _cached(files) == 8 * MIB
    with enforced(0, ReadFiles(files).take_back) as seen:
        while _cached(files):
            pass
        assert seen()[0] == "governor"


@pytest.mark.parametrize("control", ["memory.max", "memory.limit_in_bytes"])
def test_a_cgroup_takes_over(control: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / control).touch()
    monkeypatch.setenv("EVERMIND_BENCH_CGROUP", str(tmp_path))
    with enforced(MIB, lambda: pytest.fail("the kernel governs")) as seen:
        assert seen()[0] == "cgroup"
    assert (tmp_path / control).read_text() == str(MIB + BESIDES)
    assert (tmp_path / "cgroup.procs").read_text() == str(os.getpid())
    with pytest.raises(OSError, match="no memory cgroup"):
        join_cgroup(tmp_path / "absent", MIB)


def _cached(paths: list[Path]) -> int:
    total = 0
    for path in paths:
        with path.open("r+b") as file:
            total += page_cache.cached_bytes(file.fileno(), 0, MIB) or 0
    return total


def _drop(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            page_cache.drop(file.fileno(), 0, MIB)
