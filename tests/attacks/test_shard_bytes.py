"""Hostile and damaged shards: nothing but the exact bytes is ever accepted."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
from evermind_manifests import open_package
from evermind_manifests.errors import (
    EvermindPackError,
    IntegrityError,
    ShardDigestError,
    ShardError,
    TruncatedError,
)
from evermind_manifests.shard import read_shard
from evermind_manifests.validate import validate
from hypothesis import given
from hypothesis import strategies as st

from tests.manifests.builders import replace_file, tiny_layout, tiny_shard, write_tiny

SHARD = "experts/l000/e0000.moe0"
GOOD = tiny_shard(0, 0)
HEADER: dict[str, Any] = msgpack.unpackb(GOOD[16 : 16 + struct.unpack_from("<I", GOOD, 8)[0]])


def forge(header: Any, size: int = 448, first: int = 192) -> bytes:
    """A shard with the given header, raw or to be packed, and zeros for weights."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    head = struct.pack("<4I", 0x4D6F4530, 3, len(packed), first) + packed
    return head + bytes(max(0, size - len(head)))


def tensors(**change: Any) -> dict[str, Any]:
    """The good header with its first tensor changed."""
    names = ["name", "dtype", "shape", "offset", "bytes"]
    first = dict(zip(names, HEADER["tensors"][0], strict=True)) | change
    return HEADER | {"tensors": [[first[name] for name in names], *HEADER["tensors"][1:]]}


def test_the_forgery_is_good_when_nothing_is_wrong() -> None:
    assert read_shard(forge(HEADER), "s").header.tensors == tiny_layout().tensors


@pytest.mark.parametrize("length", range(0, 448))
def test_cut_anywhere(length: int) -> None:
    with pytest.raises((TruncatedError, ShardError), match=r"^shard"):
        read_shard(GOOD[:length], "shard")


@pytest.mark.parametrize("length", [0, 3, 15, 16, 17, 60, 191, 192, 193, 320, 447])
def test_a_file_cut_anywhere(tmp_path: Path, length: int) -> None:
    write_tiny(tmp_path / "p")
    (tmp_path / "p" / SHARD).write_bytes(GOOD[:length])
    with open_package(tmp_path / "p") as package:
        with pytest.raises(TruncatedError, match=rf"{SHARD}: expected 448 bytes from 0"):
            package.read_shard(0, 0)
        with pytest.raises(IntegrityError, match=rf"{SHARD}: expected 448 bytes"):
            package.read_file(SHARD)
    report = validate(tmp_path / "p", deep=True)
    assert report.exit_code == 3
    assert ("size-mismatch", SHARD) in {(item.code, item.place) for item in report.errors}


def test_a_bit_flipped_anywhere(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p")
    path = tmp_path / "p" / SHARD
    with open_package(tmp_path / "p") as package:
        for position in range(len(GOOD)):
            data = bytearray(GOOD)
            data[position] ^= 1 << (position % 8)
            path.write_bytes(data)
            with pytest.raises(ShardDigestError, match=r"expected [0-9a-f]{64} .*\n  found"):
                package.read_shard(0, 0)


def test_a_flip_outside_the_weights_is_seen_without_a_digest() -> None:
    """Header and padding are checked for what they say, so that nothing can hide there."""
    weights = {
        position
        for spec in tiny_layout().tensors
        for position in range(spec.offset, spec.offset + spec.bytes)
    }
    good = read_shard(GOOD, "s").header
    for position in set(range(len(GOOD))) - weights:
        data = bytearray(GOOD)
        data[position] ^= 1
        try:
            found = read_shard(bytes(data), "s").header
        except (ShardError, TruncatedError):
            continue
        assert found != good, f"byte {position} does not matter"


@pytest.mark.parametrize("cut", [(0, 1), (1, 2)])
def test_swapped_experts(tmp_path: Path, cut: tuple[int, int]) -> None:
    """Right bytes, right digest, wrong slot."""
    write_tiny(tmp_path / "p")
    one, other = (f"experts/l000/e{expert:04d}.moe0" for expert in cut)
    first, second = (tmp_path / "p" / one).read_bytes(), (tmp_path / "p" / other).read_bytes()
    replace_file(tmp_path / "p", one, second)
    replace_file(tmp_path / "p", other, first)
    with open_package(tmp_path / "p") as package:
        for expert, found in (cut, cut[::-1]):
            message = f"expected layer 0 expert {expert}, found layer 0 expert {found}"
            with pytest.raises(ShardError, match=message):
                package.read_shard(0, expert)
    assert validate(tmp_path / "p", deep=True).exit_code == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found 0 bytes"),
        (b"\0" * 448, "magic: expected 0x4d6f4530, found 0x00000000"),
        (GOOD[:4] + b"\1" + GOOD[5:], "version: expected 3, found 1"),
        (GOOD[:4] + b"\4" + GOOD[5:], "version: expected 3, found 4"),
        (GOOD[:8] + b"\xff" * 4 + GOOD[12:], "header: 4,294,967,295 bytes, over 1,048,576"),
        (GOOD[:12] + struct.pack("<I", 190) + GOOD[16:], "first tensor: expected a multiple of 64"),
        (GOOD[:12] + struct.pack("<I", 64) + GOOD[16:], "first tensor: expected a multiple of 64"),
        (GOOD[:12] + struct.pack("<I", 2**32 - 64) + GOOD[16:], "the end at 448"),
        (GOOD[:12] + struct.pack("<I", 256) + GOOD[16:], "w1: expected offset 256, found 192"),
        (GOOD + b"\1" + bytes(63), "byte 448: expected zero padding, found 0x01"),
        (GOOD + bytes(1), "length: expected a multiple of 64, found 449"),
        (forge(HEADER | {"more": 1}), "unknown field `more`"),
        (forge({"layer": 0}), "missing required field `expert`"),
        (forge(HEADER | {"layer": -1}), "Expected `int` >= 0"),
        (forge(HEADER | {"layer": 2**32}), "Expected `int` <= 4294967295"),
        (forge(HEADER | {"layer": "0"}), "Expected `int`, got `str`"),
        (forge(HEADER | {"layer": 0.0}), "Expected `int`, got `float`"),
        (forge(HEADER | {"extra": {"a": b"x"}}), "extra: bytes is not allowed"),
        (forge(HEADER | {"extra": {"t": msgpack.Timestamp(0)}}), "Timestamp is not allowed"),
        (forge(HEADER | {"extra": {"t": msgpack.ExtType(5, b"x")}}), "extension type 5"),
        (forge(HEADER | {"tensors": []}), "tensors: there are none"),
        (forge([1, 2, 3]), "Expected `object`, got `array`"),
        (forge(b""), "header: "),
        (forge(b"\xc1"), "header: "),
        (forge(msgpack.packb(HEADER) + b"\0"), "header: "),
        (forge(msgpack.packb(HEADER)[:-3]), "header: "),
        (forge(b"\x82\xa1a\x01\xa1a\x02"), "the key 'a' stands twice in one object"),
        (forge(b"\x81\x01\x02"), "header: "),
        (forge(b"\x91" * 100, 448), "header: "),
        (forge(b"\xdd\xff\xff\xff\xff"), "header: "),
        (forge(b"\x91" * 5000, 8192, 5056), "header: "),
        (forge(tensors(offset=193)), "w1: offset 193 is not a multiple of 64"),
        (forge(tensors(offset=448)), "w1: expected offset 192, found 448"),
        (forge(tensors(offset=2**53 - 64)), "w1: expected offset 192"),
        (forge(tensors(offset=2**63)), "Expected `int` <= 9007199254740991"),
        (forge(tensors(bytes=63)), "w1: f16 [8, 4] needs 64 bytes, found 63"),
        (forge(tensors(bytes=2**63)), "Expected `int` <= 9007199254740991"),
        (forge(tensors(shape=[2**31 - 1] * 3)), "found 64"),
        (forge(tensors(shape=[2**31])), "Expected `int` <= 2147483647"),
        (forge(tensors(shape=[1] * 17)), "length <= 16"),
        (forge(tensors(shape=[0])), "Expected `int` >= 1"),
        (forge(tensors(shape=[128], bytes=256)), "overlaps what ends at 448"),
        (forge(tensors(shape=[160], bytes=320)), "w1: ends at 512, the shard at 448"),
        (forge(tensors(dtype="f64")), "needs 256 bytes, found 64"),
        (forge(tensors(dtype="pickle")), "Invalid enum value 'pickle'"),
        (forge(tensors(name="b1")), "the name stands twice"),
        (forge(tensors(name="")), "length >= 1"),
        (forge(HEADER | {"tensors": HEADER["tensors"][::-1]}), "expected offset 192"),
        (
            forge(HEADER | {"tensors": [HEADER["tensors"][0][:4]]}),
            "at least length 5",
        ),
    ],
)
def test_forged_headers(data: bytes, message: str) -> None:
    with pytest.raises(EvermindPackError) as caught:
        read_shard(data, "shard")
    assert isinstance(caught.value, ShardError | TruncatedError)
    assert str(caught.value).startswith("shard: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("depth", [17, 400, 900])
def test_deep_extra(depth: int) -> None:
    extra: Any = None
    for _ in range(depth):
        extra = {"a": extra}
    with pytest.raises(ShardError, match=r"shard: .*(deep|header)"):
        read_shard(forge(HEADER | {"extra": extra}, 8192, 8128), "shard")


@given(st.data())
def test_a_damaged_shard_never_crashes(data: st.DataObject) -> None:
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 191))] = data.draw(st.integers(0, 255))
    try:
        contents = read_shard(bytes(raw), "shard")
    except (ShardError, TruncatedError):
        return
    for spec in contents.header.tensors:
        assert len(contents.views[spec.name]) == spec.bytes
