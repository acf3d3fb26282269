"""Compute the next item while the last one is used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def one_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """`items`, each computed on another thread while the caller uses the one before it.

    No more than two are held at a time. What computing one raises is raised in its place. To
    be closed if it is not used up: that ends the thread.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(lambda: list(islice(items, 1)))
        while found := pending.result():
            pending = thread.submit(lambda: list(islice(items, 1)))
            yield found.pop()
