"""Exports that are cut off: full disk, Ctrl-C, kill -9. A whole package stays, or nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evermind_manifests import open_package
from evermind_manifests.errors import ExportError
from evermind_manifests.validate import validate

from tests.manifests.builders import write_tiny

ROOT = Path(__file__).parents[2]

# Writes a tiny package, and stops after the third shard until it is told to go on.
CHILD = """
import sys
from pathlib import Path
from tests.manifests.builders import tiny_shard, write_tiny

def shard(layer, expert):
    if (layer, expert) == (1, 0):
        print("three shards", flush=True)
        sys.stdin.readline()
    return tiny_shard(layer, expert)

write_tiny(Path(sys.argv[1]), overwrite=True, shard=shard)
"""


def start(destination: Path) -> subprocess.Popen[str]:
    """An export in another process, stopped in the middle."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(destination)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "three shards\n"
    return child


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize("existing", [False, True])
def test_kill_9(tmp_path: Path, name: str, existing: bool) -> None:
    before = write_tiny(tmp_path / name, graphs={"profile.json": b"{}"}) if existing else None
    child = start(tmp_path / name)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert listing(tmp_path) == [f".{name}.partial", *([name] if existing else [])]
    if before is not None:
        with open_package(tmp_path / name) as package:
            assert package.digest == before
    # The next export finds the dead one's leftover, and removes it.
    digest = write_tiny(tmp_path / name, overwrite=True)
    assert listing(tmp_path) == [name]
    with open_package(tmp_path / name) as package:
        assert package.digest == digest
    assert validate(tmp_path / name, deep=True).problems == ()


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c(tmp_path: Path, name: str, existing: bool) -> None:
    before = write_tiny(tmp_path / name) if existing else None
    child = start(tmp_path / name)
    child.send_signal(signal.SIGINT)
    assert child.wait() != 0
    assert listing(tmp_path) == ([name] if existing else [])
    if before is not None:
        with open_package(tmp_path / name) as package:
            assert package.digest == before


def test_a_running_export_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    child = start(tmp_path / "p")
    with pytest.raises(ExportError, match="another export to it is running"):
        write_tiny(tmp_path / "p")
    child.communicate("go on\n")
    assert child.wait() == 0
    assert validate(tmp_path / "p", deep=True).problems == ()
    assert listing(tmp_path) == ["p"]


def full_after(count: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, with a disk that is full from the `count`-th call on."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    return call


def full_for_writers(count: int) -> Callable[..., Any]:
    """`Path.open`, with a disk that takes `count` files: what is there can still be read."""
    opened = Path.open
    full = full_after(count, opened)

    def call(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return (opened if mode.startswith("r") else full)(path, mode, *args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize("layout", ["files", "pool"])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("count", [0, 3, 7, 12])
def test_a_full_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    layout: Any,
    existing: bool,
    count: int,
) -> None:
    before = write_tiny(tmp_path / name) if existing else None
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full_for_writers(count))
        if layout == "pool" and count > 7:
            # By then only the pool is written to, and it is open already.
            patched.undo()
            patched.setattr("evermind_manifests.output.Output.write", full_after(0, print))
        with pytest.raises(ExportError) as caught:
            write_tiny(tmp_path / name, layout=layout, overwrite=existing)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: the disk is full: ")
    assert "are written, the next" in message
    assert "are needed" in message
    assert "are free" in message
    assert listing(tmp_path) == ([name] if existing else [])
    if before is not None:
        with open_package(tmp_path / name) as package:
            assert package.digest == before


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.rename", "pathlib.Path.replace"])
def test_an_error_at_the_very_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    if (name == "p") == (step == "pathlib.Path.replace"):
        step = "os.fsync"
    owner, attribute = step.rsplit(".", 1)
    target: Any = os if owner == "os" else Path
    with monkeypatch.context() as patched:
        patched.setattr(target, attribute, full_after(0, getattr(target, attribute)))
        with pytest.raises(ExportError, match="the disk is full"):
            write_tiny(tmp_path / name)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["p", "p.zip"])
@pytest.mark.parametrize("layout", ["files", "pool"])
def test_a_write_that_really_fails(tmp_path: Path, name: str, layout: str) -> None:
    """A limit on the size of files is the full disk that every machine has."""
    script = (
        "import resource, signal, sys; from pathlib import Path;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "from tests.manifests.builders import write_tiny;"
        "write_tiny(Path(sys.argv[1]), layout=sys.argv[2],"
        " graphs={'profile.json': bytes(3000)} if sys.argv[2] == 'files' else {})"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path / name), layout],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"ExportError: {tmp_path / name}: cannot be written: File too large" in done.stderr
    assert listing(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        place = Path("/proc/p")
    else:
        (tmp_path / "locked").mkdir(mode=0o555)
        place = tmp_path / "locked" / "p"
    with pytest.raises(ExportError, match="cannot be written"):
        write_tiny(place)
