"""Every benchmark runs, on models of seconds: what it measures decides nothing here."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
from evermind_exporters.checkpoints import Checkpoint, write_evl0
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import NAMES, NOTEBOOK, with_block
from benchmarks.balloon import Balloon, excess
from benchmarks.common import MIB, as_markdown, as_text, fresh, report_of
from benchmarks.limited import Comparison, Found, Way
from benchmarks.memory_limit import held
from benchmarks.models import language_model
from tests.interop.peer import missing


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


def test_a_cgroup_is_bounded_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for control in ("memory.max", "memory.limit_in_bytes"):
        folder = tmp_path / control
        folder.mkdir()
        (folder / control).touch()
        monkeypatch.setenv("EVERMIND_BENCH_CGROUP", str(folder))
        with held(MIB) as holding:
            holding.join(123)
        assert holding.by == "a cgroup"
        assert (folder / control).read_text() == str(MIB)
        assert (folder / "cgroup.procs").read_text() == "123"
    monkeypatch.setenv("EVERMIND_BENCH_CGROUP", str(tmp_path / "absent"))
    with pytest.raises(OSError, match="no memory cgroup"), held(MIB):
        pass


def test_a_process_joins_before_it_does_anything(tmp_path: Path) -> None:
    seen: list[int] = []
    assert fresh(os.getpid, begun=seen.append) == seen[0]


def test_a_side_without_memory_is_told_from_one_that_fails(tmp_path: Path) -> None:
    source = language_model(width=512, layers=1, experts=16, top_k=2, hidden=1024)
    file = tmp_path / "model.evl0"
    file.write_bytes(write_evl0(Checkpoint("evermind-lm", source.config, dict(source.tensors))))
    assert file.stat().st_size > 64 * MIB
    way = Way("numpy", "Numpy", {"file": str(file), "mapped": False}, own=True)
    comparison = Comparison([way], tmp_path, source.config["vocabSize"], tokens=1)
    comparison.without_limit(1)
    found = comparison.found["numpy"]
    assert isinstance(found, Found)
    assert found.own > 64 * MIB
    comparison.refuse(64 * MIB)
    assert found.refused
    comparison.refuse(512 * MIB)
    assert not found.refused
    file.unlink()
    with pytest.raises(RuntimeError, match="LocationError"):
        comparison.refuse(64 * MIB)


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_a_peer_that_dies_of_want_does_not_run(tmp_path: Path) -> None:
    source = language_model(width=64, layers=1, experts=4, top_k=2, hidden=64)
    file = tmp_path / "model.evl0"
    file.write_bytes(write_evl0(Checkpoint("evermind-lm", source.config, dict(source.tensors))))
    arguments = {"file": str(file), "config": dict(source.config)}
    way = Way("npm peer", "Npm", arguments, own=True)
    comparison = Comparison([way], tmp_path, source.config["vocabSize"], tokens=1)
    comparison.without_limit(1)
    comparison.refuse(4 * MIB)
    found = comparison.found["npm peer"]
    assert isinstance(found, Found)
    assert found.refused


@given(
    free=st.integers(0, 2**35),
    used=st.integers(0, 2**35),
    limit=st.integers(0, 2**35),
    reserve=st.integers(0, 2**28),
)
def test_a_balloon_leaves_the_limit(free: int, used: int, limit: int, reserve: int) -> None:
    taken = excess(free, used, limit, reserve)
    left = free - taken - reserve + used
    assert left == limit or (taken == 0 and limit <= used and left < limit)


def test_a_balloon_counts_what_it_locks() -> None:
    balloon = Balloon()
    try:
        balloon.take(9 * MIB)
    except OSError:
        pytest.skip("this user may not lock memory")
    assert balloon.bytes == 8 * MIB
    (locked,) = re.findall(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert int(locked) >= 8 * 1024
    balloon.give_back(5 * MIB)
    assert balloon.bytes == 4 * MIB
    balloon.give_back(4 * MIB)
    assert balloon.bytes == 0


def test_a_balloon_that_need_take_nothing_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVERMIND_BENCH_CGROUP", raising=False)
    monkeypatch.setenv("EVERMIND_BENCH_BALLOON", "1")
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with held(everything) as holding:
        assert holding.by == "a balloon"
    assert "MiB used at most" in holding.by


def test_less_than_processes_need_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVERMIND_BENCH_CGROUP", raising=False)
    monkeypatch.setenv("EVERMIND_BENCH_BALLOON", "1")
    with pytest.raises(RuntimeError, match="holds no limit"), held(-(2**40)):
        pass
