"""Reads past the page cache, and of neighbours at once: when, and what refuses them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evermind_manifests.errors import (
    InputError,
    TruncatedError,
)
from evermind_runtime.shard_reader import ShardReader

from tests.packages import export, random_source
from tests.runtime.large_experts import CONFIG, EXPERTS, LAYERS, TOKENS, load
from tests.runtime.paging import check_idle, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")


def refuse(error: int) -> Callable[..., Any]:
    def open_extent(path: str, flags: int = 0) -> tuple[int, int, int]:
        raise OSError(error, "made for a test")

    return open_extent


def test_auto_reads_directly_only_what_the_page_cache_cannot_hold(
    large_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room, mode in ((None, "buffered"), (1 << 40, "buffered"), (1 << 20, "direct")):
        monkeypatch.setattr("evermind_runtime.shard_reader.available_bytes", lambda room=room: room)
        with load(large_package, budget="50%") as model:
            assert model.stats().io == mode
            assert bool(model.stats().io_note) == (mode == "buffered")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_direct_reads_is_read_buffered(
    large_package: Path, large_results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("evermind_runtime.shard_reader.available_bytes", lambda: 0)
    kind = type(load(large_package)._package.store)
    with load(large_package, budget="50%") as model:
        # Refused from the second file on: what is read buffered then is said.
        model._package.store.open_extent = refuse(code)  # type: ignore[attr-defined]
        model._pager.reader._files._open = refuse(code)
        assert model.stats().io == "direct"
        assert same_bits(model.forward(TOKENS), large_results["prefill"])
        assert model.stats().io == "buffered"
        assert "refused" in model.stats().io_note
    monkeypatch.setattr(kind, "open_extent", staticmethod(refuse(code)))
    with load(large_package, budget="50%") as model:
        assert model.stats().io == "buffered"
    with pytest.raises(InputError, match="cannot be had"):
        load(large_package, io="direct")


def test_direct_reads_that_cannot_be_had_are_refused(large_package: Path, lm_package: Path) -> None:
    with pytest.raises(InputError, match="too small"):
        load(lm_package, io="direct")
    with pytest.raises(InputError, match="expected one of"):
        load(lm_package, io="quick")  # type: ignore[arg-type]


def test_a_shard_cut_short_is_named_by_direct_reads_too(
    large_package: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(large_package, tmp_path / "lm"))
    path = copy / "experts" / "l001" / "e0002.moe0"
    os.truncate(path, path.stat().st_size - 64)
    with load(copy, io="direct") as model, pytest.raises(TruncatedError, match="e0002"):
        model.forward(TOKENS)


@pytest.mark.parametrize("layout", ["files", "pool"])
@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_every_layout_can_be_read_directly(tmp_path: Path, layout: Any, suffix: str) -> None:
    path = export(random_source("evermind-lm", CONFIG), tmp_path / f"lm{suffix}", layout=layout)
    with load(path) as whole, load(path, budget="50%", io="direct") as model:
        assert same_bits(model.forward(TOKENS), whole.forward(TOKENS))
        assert model.stats().io == "direct"


def test_neighbours_in_a_pool_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = CONFIG | {"dModel": 32, "hiddenDim": 48}
    path = export(random_source("evermind-lm", small), tmp_path / "lm", layout="pool")
    reads: list[int] = []
    honest = ShardReader._read_together

    def counting(self: Any, shards: Any, rooms: Any) -> None:
        reads.append(len(shards))
        honest(self, shards, rooms)

    monkeypatch.setattr(ShardReader, "_read_together", counting)
    with load(path) as model:
        whole = model.forward(TOKENS)
    # A quarter of the slots at once.
    assert max(reads) == LAYERS * EXPERTS // 4
    with load(path, budget="50%", verify="always") as model:
        assert same_bits(model.forward(TOKENS), whole)
        check_idle(model)
