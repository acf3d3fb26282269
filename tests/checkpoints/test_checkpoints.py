"""Golden checkpoint files read and written back byte for byte; damaged ones refused."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from evermind_exporters.checkpoints import (
    Checkpoint,
    canonical_shapes,
    parameter_count,
    read_checkpoint,
    read_evl0,
    read_moe0,
    write_evl0,
    write_lmbc,
    write_moe0,
)
from evermind_manifests.errors import CheckpointError

WRITERS = {
    "shared-expert-moe": write_moe0,
    "evermind-lm": write_evl0,
    "limbic": write_lmbc,
}
PAIRS = [
    *((case, "moe") for case in ("moe_small", "moe_six")),
    *((case, "lm") for case in ("lm_small", "lm_init", "lm_trained")),
    *((case, "limbic") for case in ("limbic_small", "limbic_default")),
]
EVERY_FILE = [
    *((case, f"{stem}.v{version}.bin") for case, stem in PAIRS for version in (1, 2)),
    ("moe_default", "moe.v2.bin"),
    ("lm_default", "lm.v2.bin"),
    ("moe_train_full", "final.v2.bin"),
    ("moe_train_mini", "final.v1.bin"),
    ("limbic_train", "init.v1.bin"),
    ("limbic_train_decay", "final.v2.bin"),
    ("lm_train", "final.v1.bin"),
    ("export_lm", "lm.v1.bin"),
]
SMALL = {
    "shared-expert-moe": ("moe_small", "moe.v1.bin"),
    "evermind-lm": ("lm_init", "lm.v1.bin"),
    "limbic": ("limbic_small", "limbic.v1.bin"),
}


@pytest.mark.parametrize(("case", "name"), EVERY_FILE)
def test_golden_file_survives_a_round_trip(golden, case, name):
    data = golden(case).bytes(name)
    checkpoint = read_checkpoint(data, name)
    assert checkpoint.half == name.endswith("v2.bin")
    shapes = canonical_shapes(checkpoint.family, checkpoint.config)
    assert {key: value.shape for key, value in checkpoint.tensors.items()} == shapes
    assert list(checkpoint.tensors) == list(shapes)
    assert WRITERS[checkpoint.family](checkpoint, half=checkpoint.half) == data


@pytest.mark.parametrize(("case", "stem"), PAIRS)
def test_truncating_float32_weights_gives_the_golden_half_file(golden, case, stem):
    full = read_checkpoint(golden(case).bytes(f"{stem}.v1.bin"), case)
    half = golden(case).bytes(f"{stem}.v2.bin")
    assert WRITERS[full.family](full, half=True) == half
    assert WRITERS[full.family](full, half=True, rounding="nearest") != half


def test_parameters_stand_where_the_peer_exports_them(golden):
    case = golden("moe_small")
    checkpoint = read_moe0(case.bytes("moe.v1.bin"), "moe")
    for expert in range(4):
        joined = np.concatenate(
            [checkpoint.tensors[f"experts.{expert}.{name}"].ravel() for name in _FFN]
        )
        assert joined.tobytes() == case.bytes(f"expert_{expert}.f32")


def test_lm_tensor_names_and_shapes_are_the_peers(golden):
    for case in ("lm_small", "lm_init", "lm_default"):
        json = golden(case).json
        shapes = canonical_shapes("evermind-lm", json["resolved_config"])
        expected = [(tensor["name"], tuple(tensor["shape"])) for tensor in json["tensors"]]
        assert list(shapes.items()) == expected


def test_legacy_lm_file_has_no_trailer(golden):
    case = golden("lm_small")
    legacy = case.bytes("lm.v1.legacy.bin")
    checkpoint = read_evl0(legacy, "legacy")
    assert write_evl0(checkpoint, trailer=False) == legacy
    assert write_evl0(checkpoint) == case.bytes("lm.v1.bin")


def test_reads_at_any_alignment(golden):
    data = golden("lm_small").bytes("lm.v1.bin")
    for shift in range(4):
        shifted = memoryview(bytes(shift) + data)[shift:]
        checkpoint = read_checkpoint(shifted, "shifted")
        assert all(tensor.flags.aligned for tensor in checkpoint.tensors.values())
        assert write_evl0(checkpoint) == data


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("version", [0, 3, 0xFFFFFFFF])
def test_refuses_an_unknown_version(golden, family, version):
    data = bytearray(_small(golden, family))
    struct.pack_into("<I", data, 4, version)
    with pytest.raises(CheckpointError, match=rf"FILE: .* version: .*found {version}"):
        read_checkpoint(bytes(data), "FILE")


@pytest.mark.parametrize("family", SMALL)
def test_refuses_every_other_length(golden, family):
    data = _small(golden, family)
    for cut in (
        0,
        3,
        4,
        7,
        19,
        23,
        35,
        len(data) // 2,
        len(data) - 9,
        len(data) - 4,
        len(data) - 1,
    ):
        with pytest.raises(CheckpointError, match="FILE"):
            read_checkpoint(data[:cut], "FILE")
    for extra in (1, 4, 8):
        with pytest.raises(CheckpointError, match="length: expected"):
            read_checkpoint(data + bytes(extra), "FILE")


@pytest.mark.parametrize("family", SMALL)
def test_refuses_dimensions_that_cannot_be(golden, family):
    data = _small(golden, family)
    words = {"shared-expert-moe": 4, "evermind-lm": 7, "limbic": 3}[family]
    for word in range(words):
        for value in (0, 0x7FFFFFFF, 0xFFFFFFFF):
            changed = bytearray(data)
            struct.pack_into("<I", changed, 8 + 4 * word, value)
            with pytest.raises(CheckpointError, match="FILE"):
                read_checkpoint(bytes(changed), "FILE")


def test_refuses_more_routed_experts_than_there_are(golden):
    data = bytearray(_small(golden, "shared-expert-moe"))
    struct.pack_into("<I", data, 20, 5)
    with pytest.raises(CheckpointError, match="topK: expected at most numExperts = 4, found 5"):
        read_checkpoint(bytes(data), "FILE")


def test_refuses_an_unknown_magic():
    with pytest.raises(CheckpointError, match=r"FILE: magic: .*found 0x00000000"):
        read_checkpoint(bytes(64), "FILE")


def test_every_changed_bit_of_an_lm_file_with_trailer_is_noticed(golden):
    data = _small(golden, "evermind-lm")
    for offset in (36, 100, len(data) - 9, len(data) - 8, len(data) - 4, len(data) - 1):
        changed = bytearray(data)
        changed[offset] ^= 0x10
        with pytest.raises(CheckpointError, match="CRC"):
            read_checkpoint(bytes(changed), "FILE")


def test_writers_refuse_tensors_that_do_not_fit(golden):
    good = read_moe0(_small(golden, "shared-expert-moe"), "moe")
    missing = {name: value for name, value in good.tensors.items() if name != "shared.b1"}
    turned = good.tensors | {"experts.1.w1": good.tensors["experts.1.w1"].T}
    unknown = good.tensors | {"router.bias": np.zeros(4, np.float32)}
    for tensors, named in ((missing, "shared.b1"), (turned, "experts.1.w1"), (unknown, "bias")):
        with pytest.raises(CheckpointError, match=named):
            write_moe0(Checkpoint(good.family, good.config, tensors))
    with pytest.raises(CheckpointError, match="family"):
        write_lmbc(good)


@pytest.mark.parametrize(
    ("case", "family"),
    [
        ("moe_default", "shared-expert-moe"),
        ("lm_default", "evermind-lm"),
        ("limbic_default", "limbic"),
    ],
)
def test_parameter_count_agrees_with_the_shapes(golden, case, family):
    config = golden(case).json["resolved_config"]
    shapes = canonical_shapes(family, config)
    assert parameter_count(family, config) == sum(int(np.prod(shape)) for shape in shapes.values())


def test_digest_only_float32_file_is_reproduced_from_the_half_one(golden):
    # The half file cannot give the float32 one back; writing it as f32 must still be exact.
    case = golden("lm_default")
    checkpoint = read_evl0(case.bytes("lm.v2.bin"), "lm")
    as_f32 = write_evl0(checkpoint)
    assert len(as_f32) == case.json["digests"]["lm.v1.bin"]["bytes"]
    again = write_evl0(read_evl0(as_f32, "again"), half=True)
    assert hashlib.sha256(again).digest() == hashlib.sha256(case.bytes("lm.v2.bin")).digest()


_FFN = ("w1", "b1", "w2", "b2")


def _small(golden, family: str) -> bytes:
    case, name = SMALL[family]
    return golden(case).bytes(name)
