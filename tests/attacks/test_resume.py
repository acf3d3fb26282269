"""Writers that are cut off and go on: the same bytes as without, wherever the cut was."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from evermind_manifests import PackageWriter
from evermind_manifests import output as output_module
from evermind_manifests import writer as writer_module
from evermind_manifests.errors import (
    ConfigError,
    ContentError,
    EvermindPackError,
    ExportError,
    LocationError,
    TruncatedError,
)
from evermind_manifests.journal import JOURNAL_NAME, read_journal
from evermind_manifests.staging import unfinished
from evermind_manifests.validate import validate

from tests.manifests.builders import (
    EXPERTS,
    LAYERS,
    tiny_graphs,
    tiny_manifest,
    tiny_resident,
    tiny_shard,
    write_tiny,
)

KEY = {"checkpoint": "1", "dtype": "f16"}
PLACES = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
Layout = Literal["files", "pool"]


@cache
def files() -> dict[str, bytes]:
    return {
        **tiny_graphs(),
        "graphs/resident.safetensors": tiny_resident(),
        "parity.json": b'{"cases": []}\n',
    }


def write(
    destination: Path,
    layout: Layout = "files",
    *,
    key: dict[str, str] = KEY,
    restart: bool = False,
    shard: Callable[[int, int], bytes] = tiny_shard,
) -> tuple[str, list[tuple[int, int]]]:
    """The digest, and which shards were written: the others were there."""
    written = []
    with PackageWriter(destination, layout=layout, resumable=True) as writer:
        kept = writer.resume(key, restart=restart)
        for path, data in files().items():
            writer.add_file(path, data)
        for place in PLACES:
            if place not in kept:
                writer.add_shard(*place, shard(*place))
                written.append(place)
        return writer.finish(tiny_manifest()), written


def stopping(error: BaseException, at: int = 4) -> Callable[[int, int], bytes]:
    """Shards up to the `at`-th, then `error`."""

    def shard(layer: int, expert: int) -> bytes:
        if (layer, expert) == PLACES[at]:
            raise error
        return tiny_shard(layer, expert)

    return shard


def stop(destination: Path, layout: Layout = "files", at: int = 4) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(destination, layout, shard=stopping(KeyboardInterrupt(), at))


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize("layout", ["files", "pool"])
def test_after_ctrl_c_it_goes_on(tmp_path: Path, name: str, layout: Layout) -> None:
    expected = write_tiny(tmp_path / "whole", layout=layout)
    stop(tmp_path / name, layout)
    assert listing(tmp_path) == [f".{name}.partial", "whole"]
    left = unfinished(tmp_path / name)
    assert left is not None
    assert (left.shards, left.bytes) == (4, 4 * len(tiny_shard(0, 0)))
    digest, written = write(tmp_path / name, layout)
    assert (digest, written) == (expected, PLACES[4:])
    assert listing(tmp_path) == [name, "whole"]
    assert unfinished(tmp_path / name) is None
    assert validate(tmp_path / name, deep=True).problems == ()


@pytest.mark.parametrize("layout", ["files", "pool"])
def test_a_third_writer_goes_on_from_the_second(tmp_path: Path, layout: Layout) -> None:
    stop(tmp_path / "p", layout, at=2)
    stop(tmp_path / "p", layout, at=5)
    digest, written = write(tmp_path / "p", layout)
    assert written == PLACES[5:]
    assert digest == write_tiny(tmp_path / "whole", layout=layout)


def test_an_error_in_the_content_leaves_nothing(tmp_path: Path) -> None:
    stop(tmp_path / "p", at=2)
    with pytest.raises(ContentError):
        write(tmp_path / "p", shard=stopping(ContentError("too large for f16")))
    assert listing(tmp_path) == []


@pytest.mark.parametrize("layout", ["files", "pool"])
@pytest.mark.parametrize("kind", [ExportError, ConfigError, TruncatedError, LocationError])
def test_an_error_that_says_nothing_of_the_content_keeps_what_is_there(
    tmp_path: Path, layout: Layout, kind: type[EvermindPackError]
) -> None:
    stop(tmp_path / "p", layout, at=2)
    with pytest.raises(kind) as caught:
        write(tmp_path / "p", layout, shard=stopping(kind("gone", hint="Look for it.")))
    assert caught.value.hint == (
        "Look for it. 4 experts are kept in .p.partial: the same command goes on from there."
    )
    assert write(tmp_path / "p", layout)[1] == PLACES[4:]


@pytest.mark.parametrize("layout", ["files", "pool"])
def test_a_full_disk_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    def full(layer: int, expert: int) -> bytes:
        if (layer, expert) == (1, 0):
            monkeypatch.setattr(
                output_module.Output, "write", lambda *_: (_ for _ in ()).throw(no_space)
            )
        return tiny_shard(layer, expert)

    no_space = OSError(errno.ENOSPC, "full")
    with pytest.raises(ExportError, match="the disk is full") as caught:
        write(tmp_path / "p", layout, shard=full)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("3 experts are kept in .p.partial: free some space")
    monkeypatch.undo()
    assert write(tmp_path / "p", layout)[1] == PLACES[3:]


def test_what_is_another_s_is_refused_and_stays(tmp_path: Path) -> None:
    stop(tmp_path / "p")
    with pytest.raises(
        ExportError, match=r"\.p\.partial: .* differs in dtype \(then f16, now bf16\)"
    ):
        write(tmp_path / "p", key=KEY | {"dtype": "bf16"})
    with pytest.raises(ExportError, match="an unfinished import with 4 experts is there"):
        write_tiny(tmp_path / "p")
    assert write(tmp_path / "p")[1] == PLACES[4:]


def test_it_may_be_told_to_start_anew(tmp_path: Path) -> None:
    stop(tmp_path / "p")
    assert write(tmp_path / "p", key={"checkpoint": "2"}, restart=True)[1] == PLACES
    assert listing(tmp_path) == ["p"]


def test_what_was_left_stays_where_the_next_writer_does_not_come_to_it(tmp_path: Path) -> None:
    """An error before `resume`, as for a source that is gone."""
    stop(tmp_path / "p")
    with (
        pytest.raises(ConfigError),
        PackageWriter(tmp_path / "p", resumable=True),
    ):
        raise ConfigError("no such folder")
    write_tiny(tmp_path / "q")
    (tmp_path / "q").rename(tmp_path / "p")
    with pytest.raises(ExportError, match="exists already"):
        write(tmp_path / "p")
    (tmp_path / "p").rename(tmp_path / "q")
    assert write(tmp_path / "p")[1] == PLACES[4:]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("layout", ["files", "pool"])
def test_damaged_shards_are_written_again(tmp_path: Path, layout: Layout) -> None:
    expected = write_tiny(tmp_path / "whole", layout=layout)
    stop(tmp_path / "p", layout)
    folder = tmp_path / ".p.partial"
    if layout == "files":
        flip(folder / "experts/l000/e0001.moe0", 100)
        os.truncate(folder / "experts/l000/e0002.moe0", 20)
        with (folder / "experts/l000/e0000.moe0").open("ab") as file:
            file.write(b"more")
        again = [(0, 1), (0, 2), *PLACES[4:]]
    else:
        flip(folder / "experts/pool-000.moe0p", 4096 + 100)
        again = PLACES[1:]
    assert write(tmp_path / "p", layout) == (expected, again)


@pytest.mark.parametrize("layout", ["files", "pool"])
def test_a_file_that_is_gone_is_written_again(tmp_path: Path, layout: Layout) -> None:
    expected = write_tiny(tmp_path / "whole", layout=layout)
    stop(tmp_path / "p", layout)
    name = "l000/e0002.moe0" if layout == "files" else "pool-000.moe0p"
    (tmp_path / ".p.partial/experts" / name).unlink()
    digest, written = write(tmp_path / "p", layout)
    assert digest == expected
    assert written == ([(0, 2), *PLACES[4:]] if layout == "files" else PLACES)


def test_full_pools_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "POOL_BYTES", 2 * 4096)  # two shards each
    expected = write_tiny(tmp_path / "whole", layout="pool")
    stop(tmp_path / "p", "pool", at=5)
    (tmp_path / ".p.partial/experts/pool-002.moe0p").unlink()
    assert write(tmp_path / "p", "pool") == (expected, PLACES[4:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-3],  # a torn last line
        lambda data: data + b'{"layer": 1, "exp',
        lambda data: data.replace(b"l000/e0003", b"l000/e0002"),
        lambda data: data.replace(b'{"layer":1', b"{{"),
        lambda data: data.replace(b"experts/l000/e0001.moe0", b"../../../../../../etc/hosts"),
    ],
)
def test_a_damaged_journal_keeps_what_it_names(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    expected = write_tiny(tmp_path / "whole")
    stop(tmp_path / "p")
    journal = tmp_path / ".p.partial" / JOURNAL_NAME
    journal.write_bytes(damage(journal.read_bytes()))
    digest, written = write(tmp_path / "p")
    assert digest == expected
    assert written[-2:] == PLACES[4:]
    assert listing(tmp_path) == ["p", "whole"]


@pytest.mark.parametrize(
    "text", ["", "{}\n", "\x00" * 200, '{"format": "x", "key": {}}\n', "[1]\n"]
)
def test_a_journal_that_is_none_starts_anew(tmp_path: Path, text: str) -> None:
    stop(tmp_path / "p")
    (tmp_path / ".p.partial" / JOURNAL_NAME).write_text(text)
    assert write(tmp_path / "p")[1] == PLACES


def test_a_disk_that_fills_up_under_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line is taken back: the shards noted before it are still known."""
    monkeypatch.setattr(writer_module, "JOURNAL_BYTES", 1)
    fsync, noted = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal noted
        if Path(f"/proc/self/fd/{fd}").readlink().name == JOURNAL_NAME:
            noted += 1
            if noted >= 3:
                os.truncate(fd, os.fstat(fd).st_size - 10)
                raise OSError(errno.ENOSPC, "full")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="the disk is full"):
        write(tmp_path / "p")
    monkeypatch.undo()
    assert write(tmp_path / "p")[1] == PLACES[2:]


def test_links_are_not_followed(tmp_path: Path) -> None:
    expected = write_tiny(tmp_path / "whole")
    stop(tmp_path / "p")
    shard = tmp_path / ".p.partial/experts/l000/e0000.moe0"
    (tmp_path / "precious").write_bytes(shard.read_bytes() + b"more")
    shard.unlink()
    shard.symlink_to(tmp_path / "precious")
    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / "p")
    assert (tmp_path / "precious").read_bytes().endswith(b"more")
    assert write(tmp_path / "p", restart=True) == (expected, PLACES)


def test_shards_are_on_the_disk_before_they_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "JOURNAL_BYTES", 1)
    synced: set[int] = set()
    noted: list[tuple[int, set[int]]] = []
    fsync = os.fsync

    def spy(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", spy)

    def shard(layer: int, expert: int) -> bytes:
        found = read_journal(tmp_path / ".p.partial")
        assert found is not None
        inodes = {(tmp_path / ".p.partial" / one.file).stat().st_ino for one in found.shards}
        noted.append((len(found.shards), inodes - synced))
        return tiny_shard(layer, expert)

    write(tmp_path / "p", shard=shard)
    assert noted == [(count, set()) for count in range(len(PLACES))]


def killed_at(event: int, action: Callable[[], Any]) -> bool:
    """Do it in a process of its own that is killed at its `event`-th step on the disk."""
    child = os.fork()
    if child == 0:
        steps = 0

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        with suppress(BaseException):
            os.fsync = counting(os.fsync)
            for name in ("unlink", "rename", "replace"):
                setattr(Path, name, counting(getattr(Path, name)))
            output_module.Output.write = counting(output_module.Output.write)  # type: ignore[method-assign]
            action()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize("layout", ["files", "pool"])
def test_kill_9_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: Layout
) -> None:
    """Each process gets one step further than the last and is killed there; then one ends."""
    monkeypatch.setattr(writer_module, "JOURNAL_BYTES", 2 * len(tiny_shard(0, 0)))
    expected = write_tiny(tmp_path / "whole", layout=layout)
    destination = tmp_path / name
    resumed: set[int] = set()
    for event in range(1, 200):
        if not killed_at(event, lambda: write(destination, layout)):
            break
        if destination.exists():  # killed while it tidied up
            assert validate(destination, deep=True).problems == ()
            break
        left = unfinished(destination)
        resumed.add(left.shards if left else 0)
    else:
        raise AssertionError("never finished")
    assert resumed >= {0, 2, 4, 6}
    assert validate(destination, deep=True).problems == ()
    if name == "p":
        assert write_digest(destination) == expected
    for step in (7, 19, 33):
        # From nothing, killed once, then resumed: the same package.
        other = tmp_path / f"other{step}{Path(name).suffix}"
        assert killed_at(step, lambda other=other: write(other, layout))
        digest, written = write(other, layout)
        assert digest == expected
        assert len(written) <= len(PLACES)
        assert [one for one in listing(tmp_path) if one.startswith(f".other{step}")] == []


def write_digest(folder: Path) -> str:
    from evermind_manifests import open_package

    with open_package(folder) as package:
        return package.digest
