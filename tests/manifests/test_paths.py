"""Which paths a package may have."""

from __future__ import annotations

import pytest
from evermind_manifests.errors import PathError, UnsupportedError
from evermind_manifests.paths import ORDINARY, check_file_kind, check_path
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    "path",
    [
        "manifest.json",
        "experts/l000/e0001.moe0",
        "graphs/größe.onnx",
        "a/b c/d.png",
        "_x/-y.json",
        "graphs/v1.2/model.onnx",
        "x" * 255,
    ],
)
def test_portable_paths(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../secret.json",
        "a/../b.json",
        "a/./b.json",
        "a//b.json",
        "a/",
        ".hidden.json",
        "a/.git/config.json",
        "a\\b.json",
        "C:/x.json",
        "a:b.json",
        "a\0b.json",
        "a\nb.json",
        "a\u202eb.json",
        "a\ud800.json",
        "trailing./x.json",
        "trailing /x.json",
        " leading/x.json",
        "x.json.",
        "con",
        "CON.json",
        "a/nul.onnx",
        "com1.moe0",
        "aux .json",
        "a*.json",
        "a?.json",
        "gro\u0308ße.onnx",
        "x" * 256,
        "/".join(["x" * 200] * 6),
    ],
)
def test_paths_that_are_not(path: str) -> None:
    with pytest.raises(PathError):
        check_path(path)


@given(st.text(alphabet="ab./\\:\0 ~é", max_size=12))
def test_what_is_accepted_stays_inside(path: str) -> None:
    try:
        check_path(path)
    except PathError:
        return
    parts = path.split("/")
    assert all(part not in ("", ".", "..") for part in parts)
    assert not set(path) & set("\\:\0")


@pytest.mark.parametrize("path", ["a.onnx", "b/c.moe0p", "README.md", "x.JSON"])
def test_file_kinds(path: str) -> None:
    check_file_kind(path)


@pytest.mark.parametrize("path", ["a.py", "b.so", "a.pkl", "x.onnx/y", "onnx", "a.onnx.exe"])
def test_file_kinds_that_are_not_data(path: str) -> None:
    with pytest.raises(UnsupportedError, match="do not belong in a package"):
        check_file_kind(path)


_PARTS = ("a", "A-9_", "con", "Con1", "com1", "nul", "..", ".", "", "manifest", "x.md", "x" * 65)
_SUFFIXES = ("md", "moe0", "moe0p", "sig", "json", "exe", "MD", "", "m\nd")


@given(st.lists(st.sampled_from(_PARTS), min_size=1, max_size=9), st.sampled_from(_SUFFIXES))
def test_an_ordinary_path_passes_every_check(parts: list[str], suffix: str) -> None:
    path = "/".join(parts) + "." + suffix
    if not ORDINARY.fullmatch(path):
        return
    check_path(path)
    check_file_kind(path)
    *folders, name = path.split("/")
    assert "." in name
    assert not any("." in folder for folder in folders)
    assert path not in ("manifest.json", "manifest.sig")


@pytest.mark.parametrize("path", ["experts/l000/e0001.moe0", "README.md", "graphs/a_00.onnx"])
def test_what_exporters_write_is_ordinary(path: str) -> None:
    assert ORDINARY.fullmatch(path)
