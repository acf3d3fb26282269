"""FNV-1a and CRC-32 on the golden byte strings, and against the definition."""

from __future__ import annotations

import random
import zlib

import pytest
from evermind_exporters.checkpoints.fnv import OFFSET, PRIME, fnv1a


def by_definition(data: bytes, state: int = OFFSET) -> int:
    for byte in data:
        state = ((state ^ byte) * PRIME) % 2**32
    return state


def test_golden_hashes(golden):
    for item in golden("hash").json["items"]:
        data = bytes.fromhex(item["hex"])
        assert fnv1a(data) == item["fnv1a"]
        assert zlib.crc32(data) == item["crc32"]


def test_every_golden_package_file(golden):
    for name in ("pkg_lm_f32", "pkg_media", "export_lm"):
        case = golden(name)
        for file, entry in case.json["files"].items():
            if (case.folder / file).exists():
                assert fnv1a(case.bytes(file)) == entry["fnv1a"]


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 63, 64, 65, 1000, 32767, 32768, 32769, 70001])
def test_it_is_the_definition(size):
    data = random.Random(size).randbytes(size)
    assert fnv1a(data) == by_definition(data)
    assert fnv1a(data[size // 2 :], fnv1a(data[: size // 2])) == by_definition(data)
