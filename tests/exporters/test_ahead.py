"""Computing one item ahead: order, errors, and how much is held."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from evermind_exporters.ahead import one_ahead
from evermind_exporters.export import ShardPart, write_shards
from evermind_manifests.manifest import Layer


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


@pytest.mark.parametrize("padding", [0, 4, 60])
def test_a_tensor_is_made_while_the_one_before_its_padding_is_written(padding: int) -> None:
    size, count = 5 << 20, 4
    made = [threading.Event() for _ in range(count)]
    written: list[int] = []

    def parts() -> Iterator[ShardPart]:
        for number in range(count):
            yield (0, 0), bytes(padding)
            made[number].set()
            yield (0, 0), bytes(size)

    class Writer:
        shard_bytes = 0

        def stream_shard(self, layer: int, expert: int, parts: Iterable[bytes], _: int) -> None:
            tensors = 0
            for part in parts:
                written.append(len(part))
                if len(part) == size:
                    tensors += 1
                    assert tensors == count or made[tensors].wait(60)

    writer: Any = Writer()
    kinds: Any = {"k": SimpleNamespace(layout=SimpleNamespace(bytes=count * (size + padding)))}
    layers = [Layer(layer=0, kind="k", experts=1, top_k=1)]
    write_shards(writer, parts(), layers, kinds, None)
    assert written == [padding, size] * count
