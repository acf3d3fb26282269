"""`run --outputs` and `--state-out`: where results may be written, and how."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_manifests.package import open_package

from tests.cli.command_line import call
from tests.packages import export, lm_source


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lm_source(), tmp_path_factory.mktemp("outputs") / "lm")


@pytest.fixture
def run(package: Path, tmp_path: Path) -> list[Any]:
    np.savez(tmp_path / "in.npz", tokens=[1, 2, 3])
    return ["run", package, "--inputs", tmp_path / "in.npz", "-q"]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_new_file_has_the_permissions_the_umask_gives(
    run: list[Any], umask: None, tmp_path: Path, capsys: Any
) -> None:
    assert call(capsys, *run, "--outputs", tmp_path / "out.npz")[0] == 0
    assert stat.S_IMODE((tmp_path / "out.npz").stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "out.npz"]


def test_a_link_is_written_through(run: list[Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "real.npz", tmp_path / "link.npz"
    for _ in range(2):  # dangling, then not
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert call(capsys, *run, "--outputs", link)[0] == 0
        assert link.is_symlink()
        assert np.load(target)["logits"].shape == (3, 96)
        target.write_bytes(b"old")
    assert call(capsys, *run, "--outputs", link)[0] == 0
    assert np.load(target)["logits"].shape == (3, 96)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("option", ["--outputs", "--state-out"])
@pytest.mark.parametrize("make", [_fifo, Path.mkdir, _loop])
def test_only_regular_files_are_replaced_and_nothing_is_computed_first(
    make: Callable[[Path], None],
    option: str,
    run: list[Any],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evermind_runtime.Model.forward", _never)
    place = tmp_path / "there"
    make(place)
    before = place.lstat()
    code, out, err = call(capsys, *run, option, place)
    assert (code, out) == (2, "")
    assert "there" in err
    assert place.lstat().st_ino == before.st_ino


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("computed before the destination was checked")


@pytest.mark.parametrize(
    "places",
    [
        ["missing/out.npz"],
        ["in.npz/out.npz"],
        ["n" * 300],
        ["d/" * 3000 + "out.npz"],
        ["a.npz", "a.npz"],
        ["a.npz", "link.npz"],
    ],
)
def test_destinations_are_checked_before_anything_is_computed(
    places: list[str],
    run: list[Any],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evermind_runtime.Model.forward", _never)
    (tmp_path / "link.npz").symlink_to("a.npz")
    options = zip(("--outputs", "--state-out"), places, strict=False)
    arguments = [word for name, place in options for word in (name, tmp_path / place)]
    code, out, err = call(capsys, *run, *arguments)
    assert (code, out) == (2, "")
    assert "InputError" in err


def test_a_write_that_fails_leaves_the_old_file(
    run: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out.npz").write_bytes(b"old")
    monkeypatch.setattr(np, "savez", full)
    code, _, err = call(capsys, *run, "--outputs", tmp_path / "out.npz")
    assert code == 2
    assert "No space left" in err
    assert (tmp_path / "out.npz").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "out.npz"]


@pytest.mark.parametrize(
    ("option", "source"),
    [("--outputs", "--inputs"), ("--heatmap", "--profile")],
)
@pytest.mark.parametrize("link", [None, Path.symlink_to, Path.hardlink_to])
def test_a_result_never_replaces_what_is_read(
    option: str, source: str, link: Any, run: list[Any], tmp_path: Path, capsys: Any
) -> None:
    place = read = tmp_path / ("in.npz" if source == "--inputs" else "profile.json")
    if source != "--inputs":
        place.write_text("{}")
    if link is not None:
        link(tmp_path / "again", place)
        place = tmp_path / "again"
    before = place.read_bytes()
    given = [] if source == "--inputs" else [source, read]
    outputs = [] if option == "--outputs" else ["--outputs", tmp_path / "out.npz"]
    code, out, err = call(capsys, *run, *given, *outputs, option, place)
    assert (code, out) == (2, "")
    assert "it is what is read" in err
    assert place.read_bytes() == before
    assert not (tmp_path / "out.npz").exists()


def test_a_state_may_take_its_own_place(run: list[Any], tmp_path: Path, capsys: Any) -> None:
    saved, first = tmp_path / "state.npz", tmp_path / "first.npz"
    assert call(capsys, *run, "--state-out", first)[0] == 0
    saved.write_bytes(first.read_bytes())
    assert call(capsys, *run, "--state-in", saved, "--state-out", saved)[0] == 0
    assert call(capsys, *run, "--state-in", first, "--state-out", tmp_path / "other.npz")[0] == 0
    after, other = np.load(saved), np.load(tmp_path / "other.npz")
    assert sorted(after) == sorted(other)
    assert all(np.array_equal(after[name], other[name]) for name in after)
    assert not all(np.array_equal(after[name], np.load(first)[name]) for name in after)
    refused = call(capsys, *run, "--state-in", saved, "--outputs", saved)
    assert refused[0] == 2
    assert "it is what is read" in refused[2]


def test_convert_spares_the_package_it_reads(
    package: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_exporters.convert_package", _never)
    zipped = export(lm_source(), tmp_path / "lm.zip")
    for source, to, place, message in [
        (zipped, "evl0", zipped, "it is what is read"),
        (package, "evl0", package / "manifest.json", "would be a file of the package"),
        (package, "hf", package / "hf", "would be a file of the package"),
    ]:
        before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
        force = [] if to == "hf" else ["--force"]
        command = ["convert", source, "-o", place, "--to", to, *force]
        code, out, err = call(capsys, *command)
        assert (code, out) == (2, "")
        assert message in err
        assert {path: path.read_bytes() for path in before} == before
    with open_package(zipped) as opened:
        assert opened.manifest.family == "evermind-lm"


def test_a_result_does_not_replace_another_package(
    run: list[Any], tmp_path: Path, capsys: Any
) -> None:
    other = export(lm_source(), tmp_path / "other.zip")
    before = other.read_bytes()
    code, out, err = call(capsys, *run, "--outputs", other)
    assert (code, out) == (2, "")
    assert "other.zip: it is a package" in err
    assert other.read_bytes() == before


def test_no_run_is_trained_into_a_package(package: Path, tmp_path: Path, capsys: Any) -> None:
    before = sorted(package.rglob("*"))
    command = ["train", "tokitai", "-o", package / "run", "--size", "nano", "--steps", "1"]
    code, out, err = call(capsys, *command)
    assert (code, out) == (2, "")
    assert "would be a file of the package" in err
    assert sorted(package.rglob("*")) == before
