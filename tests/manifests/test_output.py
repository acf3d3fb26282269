"""Files of a package while they are written: every byte, in any parts, directly or not."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_manifests import output as module
from evermind_manifests.output import Output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BLOCK, DIRECT = 4 * 4096, 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(module, "_DIRECT_BYTES", DIRECT)
    monkeypatch.setattr(module, "_HANDED_BYTES", 1000)
    monkeypatch.setattr(module, "_WRITEBACK_BYTES", 5000)


def write(path: Path, sizes: list[int], flushed: list[bool]) -> bytes:
    """Write parts of these sizes, some of them flushed; check the digests, give the bytes."""
    rng = np.random.default_rng(len(sizes))
    parts = [rng.bytes(size) for size in sizes]
    spare: list[Any] = []
    alone = hashlib.sha256()
    with ThreadPoolExecutor(2) as hashers:
        output = Output("experts/e", path.open("wb", buffering=0), hashers, spare)
        for part, flush in zip(parts, flushed, strict=True):
            output.write(part, alone)
            if flush:
                output.flush()
                assert path.stat().st_size == output.position
        output.flush()
        output.close()
    data = b"".join(parts)
    assert output.entry.bytes == len(data)
    assert output.entry.sha256 == alone.hexdigest() == hashlib.sha256(data).hexdigest()
    assert len(spare) == 1
    return data


SIZES = st.sampled_from([0, 1, 999, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(st.tuples(SIZES, st.booleans()), max_size=12))
def test_all_bytes_in_any_parts(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, bool]]
) -> None:
    path = tmp_path_factory.mktemp("out") / "file"
    data = write(path, [size for size, _ in parts], [flush for _, flush in parts])
    assert path.read_bytes() == data


def watched(monkeypatch: pytest.MonkeyPatch, pwrite: Callable[..., int]) -> list[tuple[bool, int]]:
    """(directly, bytes) of every write, which `pwrite` does."""
    seen: list[tuple[bool, int]] = []

    def call(fd: int, data: memoryview, offset: int) -> int:
        directly = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        seen.append((directly, len(data)))
        return pwrite(fd, data, offset, directly)

    monkeypatch.setattr(os, "pwrite", call)
    return seen


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="O_DIRECT is Linux's")
def test_whole_blocks_go_directly_and_what_is_no_block_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system writes nothing directly")
    original = os.pwrite
    seen = watched(monkeypatch, lambda fd, data, offset, _: original(fd, data, offset))
    data = write(tmp_path / "file", [BLOCK, 2 * BLOCK + 100, 50], [False, False, False])
    assert seen == [(True, BLOCK), (True, BLOCK), (True, BLOCK), (False, 150)]
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="O_DIRECT is Linux's")
def test_a_file_system_that_refuses_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.pwrite

    def refusing(fd: int, data: memoryview, offset: int, directly: bool) -> int:
        if directly:
            raise OSError(errno.EINVAL, "not here")
        return original(fd, data, offset)

    seen = watched(monkeypatch, refusing)
    data = write(tmp_path / "file", [3 * BLOCK], [False])
    assert [directly for directly, _ in seen].count(True) <= 1
    assert (tmp_path / "file").read_bytes() == data


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite
    monkeypatch.setattr(
        os,
        "pwrite",
        lambda fd, data, offset: original(fd, data[: max(4096, len(data) // 3)], offset),
    )
    data = write(tmp_path / "file", [3 * BLOCK, 700, BLOCK], [False, True, False])
    assert (tmp_path / "file").read_bytes() == data


def test_a_full_disk_is_an_error_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full") as caught:
        write(tmp_path / "file", [2 * BLOCK], [False])
    assert caught.value.errno == errno.ENOSPC
