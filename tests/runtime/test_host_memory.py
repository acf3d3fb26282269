"""Memory for weights: aligned, apart, and no more of it in use than was written."""

from __future__ import annotations

import numpy as np
from evermind_runtime.host_memory import HostMemory
from evermind_runtime.layers import BLOCK
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 1 << 20), st.lists(st.integers(1, 200_000), max_size=20))
def test_pieces_are_aligned_and_apart(total: int, sizes: list[int]) -> None:
    memory = HostMemory(total)
    pieces = [memory.take(size) for size in sizes]
    for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert len(piece) == size
        assert piece.ctypes.data % (64 if size % BLOCK else BLOCK) == 0
        piece[:] = number
    assert all((piece == number).all() for number, piece in enumerate(pieces))


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * BLOCK


def test_only_what_is_written_takes_memory() -> None:
    before = _resident_bytes()
    memory = HostMemory(10 << 30)
    pieces = [memory.take(5 << 20) for _ in range(8)]
    for piece in pieces[:4]:
        piece[:] = 1
    used = _resident_bytes() - before
    # The fifth piece may share its first large page with the fourth.
    assert 20 << 20 <= used < 24 << 20
    assert np.add.reduce(pieces[4]) == 0
