"""What is read together: every extent once, nothing else, and no more than allowed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from evermind_runtime.read_plan import (
    GROUP_BYTES,
    MOST_GAP,
    plan_batches,
    plan_reads,
    reads_in_threads,
)
from hypothesis import given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Range:
    file: str
    offset: int
    bytes: int


@st.composite
def extents(draw: st.DrawFn) -> list[Range]:
    """Ranges of a few files that do not overlap, in any order."""
    found = []
    for file in "ab":
        end = 0
        for _ in range(draw(st.integers(0, 8))):
            offset = end + draw(st.sampled_from([0, 1, MOST_GAP, MOST_GAP + 1, 100_000]))
            size = draw(st.sampled_from([64, 4096, 300_000]))
            found.append(Range(file, offset, size))
            end = offset + size
    return list(draw(st.permutations(found)))


@given(wanted=extents(), most=st.sampled_from([0, 5000, 400_000, GROUP_BYTES]))
def test_every_extent_is_read_once_in_runs_of_neighbours(wanted: list[Range], most: int) -> None:
    groups = plan_reads(wanted, most)
    assert sorted(at for group in groups for at in group) == list(range(len(wanted)))
    assert [min(group) for group in groups] == sorted(min(group) for group in groups)
    for group in groups:
        ranges = [wanted[at] for at in group]
        for one, other in pairwise(ranges):
            assert one.file == other.file
            assert 0 <= other.offset - one.offset - one.bytes <= MOST_GAP
        span = ranges[-1].offset + ranges[-1].bytes - ranges[0].offset
        assert len(group) == 1 or span <= most


@given(wanted=extents())
def test_two_groups_could_not_have_been_one(wanted: list[Range]) -> None:
    ends = {(wanted[g[-1]].file, wanted[g[-1]].offset + wanted[g[-1]].bytes): g
            for g in plan_reads(wanted)}  # fmt: skip
    for group in plan_reads(wanted):
        first, last = wanted[group[0]], wanted[group[-1]]
        for (file, end), before in ends.items():
            if file == first.file and 0 <= first.offset - end <= MOST_GAP:
                assert last.offset + last.bytes - wanted[before[0]].offset > GROUP_BYTES


@given(
    experts=st.lists(st.integers(0, 500), unique=True, min_size=1, max_size=200),
    size=st.sampled_from([64, 4096, 132_032, 262_144, 1 << 24]),
    slots=st.integers(1, 300),
)
def test_batches_keep_the_order_and_leave_room(experts: list[int], size: int, slots: int) -> None:
    batches = plan_batches(experts, size, slots)
    assert [expert for batch in batches for expert in batch] == experts
    for batch in batches:
        assert 1 <= len(batch) <= max(1, slots // 4)
        assert len(batch) == 1 or (not reads_in_threads(size) and len(batch) * size <= GROUP_BYTES)
