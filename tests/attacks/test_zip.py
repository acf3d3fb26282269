"""Hostile archives: compressed, overlapping, doubled, lying about themselves."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from evermind_manifests import open_package
from evermind_manifests.errors import EvermindPackError, ManifestError
from evermind_manifests.validate import validate
from evermind_manifests.zip_store import ZipStore
from hypothesis import given
from hypothesis import strategies as st

from tests.manifests.builders import write_tiny

Names = list[tuple[str, bytes]]


def archive(
    path: Path, members: Names, change: Callable[[zipfile.ZipInfo], None] | None = None
) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            if change is not None:
                change(info)
            made.writestr(info, data)
    return path


def patch(path: Path, signature: bytes, offset: int, value: bytes) -> None:
    """Overwrite bytes of the first record with this signature."""
    data = bytearray(path.read_bytes())
    at = data.index(signature) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)


def read_all(path: Path) -> None:
    with ZipStore(path) as store:
        for name in store.paths():
            assert len(store.read(name, limit=100)) == store.size(name)


def refuse(path: Path, message: str) -> None:
    with pytest.raises(EvermindPackError) as caught:
        read_all(path)
    assert message in str(caught.value), str(caught.value)
    assert path.name in str(caught.value)
    assert not validate(path, deep=True).ok


def test_a_compressed_member(tmp_path: Path) -> None:
    def compress(info: zipfile.ZipInfo) -> None:
        info.compress_type = zipfile.ZIP_DEFLATED

    bomb = archive(tmp_path / "a.zip", [("manifest.json", bytes(10_000_000))], compress)
    assert bomb.stat().st_size < 20_000
    refuse(bomb, "manifest.json: expected a stored member, found compression method 8")


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "/etc/x.json",
        "a/../../x.json",
        "C:x.json",
        "a\\..\\x.json",
        "nul",
        ".a/../../x",
    ],
)
def test_a_member_that_leads_out(tmp_path: Path, name: str) -> None:
    def rename(info: zipfile.ZipInfo) -> None:
        info.filename = name

    refuse(archive(tmp_path / "a.zip", [("x", b"")], rename), "a.zip: ")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", [("a.json", b"one"), ("a.json", b"two")])
    refuse(path, "two members are named 'a.json'")


def test_a_symlink(tmp_path: Path) -> None:
    def link(info: zipfile.ZipInfo) -> None:
        info.external_attr = 0o120777 << 16

    path = archive(tmp_path / "a.zip", [("a.json", b"/etc/passwd")], link)
    refuse(path, "a.json: a symlink; packages have none")


CENTRAL = b"PK\x01\x02"
LOCAL = b"PK\x03\x04"
END = b"PK\x05\x06"


@pytest.mark.parametrize(
    ("signature", "offset", "value", "message"),
    [
        (LOCAL, 0, b"XXXX", "found a file that begins with"),
        (LOCAL, 6, b"\x01\x00", "local header: flags"),
        (LOCAL, 6, b"\x08\x00", "local header: flags"),
        (LOCAL, 8, b"\x08\x00", "local header: method"),
        (LOCAL, 14, b"\x00\x00\x00\x00", "local header: crc"),
        (LOCAL, 18, struct.pack("<I", 2), "local header: stored size"),
        (LOCAL, 22, struct.pack("<I", 2), "local header: size"),
        (LOCAL, 22, b"\xff\xff\xff\xff", "the local header has no ZIP64 sizes"),
        (LOCAL, 26, struct.pack("<H", 5), "local header: "),
        (LOCAL, 28, struct.pack("<H", 40), "what follows begins at"),
        (LOCAL, 28, struct.pack("<H", 0xFFFF), "a.json"),
        (LOCAL, 30, b"b", "local header: name: expected b'a.json' (central directory)"),
        (CENTRAL, 0, b"XXXX", "central directory: damaged"),
        (CENTRAL, 8, b"\x01\x00", "flags 0x0001: encrypted or streamed"),
        (CENTRAL, 8, b"\x08\x00", "flags 0x0008: encrypted or streamed"),
        (CENTRAL, 10, b"\x08\x00", "found compression method 8"),
        (CENTRAL, 20, struct.pack("<I", 7), "stored size: expected 4, found 7"),
        (CENTRAL, 24, struct.pack("<I", 7), "stored size: expected 7, found 4"),
        (CENTRAL, 24, b"\xff\xff\xff\xff", "no ZIP64 sizes"),
        (CENTRAL, 28, b"\xff\xff", "central directory: damaged"),
        (CENTRAL, 34, b"\x01\x00", "stored size"),
        (CENTRAL, 42, struct.pack("<I", 40), "overlaps what follows it"),
        (CENTRAL, 42, struct.pack("<I", 10**9), "overlaps what follows it"),
        (CENTRAL, 46, b"\xff", "not UTF-8"),
        (END, 0, b"XXXX", "found no end record"),
        (END, 4, b"\x01\x00", "in several parts"),
        (END, 8, b"\x03\x00", "in several parts"),
        (END, 8, b"\x01\x00\x01\x00", "bytes are left over"),
        (END, 8, b"\x03\x00\x03\x00", "central directory: cut short"),
        (END, 8, b"\xff\xff\xff\xff", "central directory: cut short"),
        (END, 12, struct.pack("<I", 10), "central directory: expected to end at"),
        (END, 16, struct.pack("<I", 10), "central directory: expected to end at"),
        (END, 20, b"\x05\x00", "without a comment"),
    ],
)
def test_records_that_lie(
    tmp_path: Path, signature: bytes, offset: int, value: bytes, message: str
) -> None:
    path = archive(tmp_path / "a.zip", [("a.json", b"1234"), ("b.json", b"5678")])
    patch(path, signature, offset, value)
    if signature == LOCAL and offset == 0:
        with pytest.raises(ManifestError, match=message):
            open_package(path)
        return
    refuse(path, message)


def test_overlapping_members(tmp_path: Path) -> None:
    """Both entries of the directory point at one member."""
    path = archive(tmp_path / "a.zip", [("a.json", b"1234"), ("b.json", b"5678")])
    data = bytearray(path.read_bytes())
    second = data.index(CENTRAL, data.index(CENTRAL) + 1)
    data[second + 42 : second + 46] = struct.pack("<I", 0)
    path.write_bytes(data)
    refuse(path, "overlaps what follows it")


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_something_beside_the_archive(tmp_path: Path, where: str) -> None:
    path = archive(tmp_path / "a.zip", [("a.json", b"1234")])
    data = path.read_bytes()
    at = {"before": 0, "between": data.index(CENTRAL), "after": len(data)}[where]
    path.write_bytes(data[:at] + b"PK\x03\x04hidden" + data[at:])
    refuse(path, "a.zip: ")


@pytest.mark.parametrize("kept", [4, 21, 22, 50, 100, 0.5, 0.99])
def test_a_package_cut_short(tmp_path: Path, kept: float) -> None:
    write_tiny(tmp_path / "p.zip")
    data = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "p.zip").write_bytes(data[: kept if kept > 1 else int(len(data) * kept)])
    with pytest.raises(EvermindPackError, match=r"p\.zip"):
        open_package(tmp_path / "p.zip")
    assert not validate(tmp_path / "p.zip").ok


@given(st.data())
def test_a_damaged_archive_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    archive(path, [("manifest.json", b"{}"), ("b/c.json", b"5678")])
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(4, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with suppress(EvermindPackError):
        read_all(path)
