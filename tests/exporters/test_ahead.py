"""Computing one item ahead: order, errors, and how much is held."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from evermind_exporters.ahead import one_ahead


def test_the_items_in_order_and_one_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    used = []
    for number in one_ahead(items()):
        used.append(number)
        assert len(made) <= number + 2
    assert used == made == list(range(5))
    assert list(one_ahead(iter(()))) == []


def test_an_error_comes_in_its_items_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    ahead = one_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the second"):
        next(ahead)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    ahead = one_ahead(iter(range(100)))
    assert next(ahead) == 0
    ahead.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
