"""`EVD0`: every golden delta is made and applied exactly; damaged and lossy ones refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from evermind_exporters.checkpoints import (
    Checkpoint,
    Delta,
    apply_checkpoint_diff,
    apply_delta,
    create_delta,
    diff_checkpoints,
    read_delta,
    read_evl0,
    write_delta,
    write_evl0,
)
from evermind_exporters.checkpoints.crc import with_trailer
from evermind_manifests.errors import CheckpointError

CASES = ["delta_row", "delta_element"]


def files(case):
    return [(delta["file"], delta["op"], delta) for delta in case.json["deltas"]]


@pytest.mark.parametrize("name", CASES)
def test_every_golden_delta_is_created_and_applied(golden, name):
    case = golden(name)
    current = case.bytes("current.v1.bin")
    seen = 0
    for file, op, recorded in files(case):
        stored = case.bytes(file)
        delta = read_delta(stored, file)
        assert delta.values.shape == (len(recorded["rows"]), recorded["row_size"])
        assert delta.rows.tolist() == recorded["rows"]
        assert write_delta(delta) == stored
        base = case.bytes(op.get("base", "base.v1.bin"))
        if op["kind"] == "diffCheckpoints":
            assert diff_checkpoints(base, current) == stored
            assert apply_checkpoint_diff(base, stored) == current
        elif op["kind"] == "exportDelta":
            model = read_evl0(base, "base")
            made = create_delta(model, read_evl0(current, "current"), op["eps"])
            assert write_delta(made) == stored
            expected = "current_from_eps_delta.v1.bin" if op["eps"] else "current.v1.bin"
            assert write_evl0(apply_delta(model, delta)) == case.bytes(expected)
        else:
            model = read_evl0(base, "base")
            assert write_delta(create_delta(model, model)) == stored
            assert write_evl0(apply_delta(model, delta)) == base
        seen += 1
    assert seen >= 4


def test_eps_is_a_strict_bound_and_rows_are_whole(golden):
    base = read_evl0(golden("delta_row").bytes("base.v1.bin"), "base")
    name = "layers.1.norm_moe.weight"
    moved = base.tensors[name].copy()
    moved[3] += np.float32(0.25)
    step = float(moved[3]) - float(base.tensors[name][3])
    current = Checkpoint(base.family, base.config, base.tensors | {name: moved})
    assert create_delta(base, current, step).rows.size == 0
    delta = create_delta(base, current, np.nextafter(step, 0))
    assert delta.values.shape == (1, base.config["dModel"])


def test_changes_a_delta_cannot_say_are_refused(golden):
    base = read_evl0(golden("delta_row").bytes("base.v1.bin"), "base")
    name = "token_embedding.weight"
    broken = base.tensors[name].copy()
    broken[0, 0] = np.nan
    current = Checkpoint(base.family, base.config, base.tensors | {name: broken})
    for one, other in ((base, current), (current, base)):
        with pytest.raises(CheckpointError, match="parameter 0 changes to or from NaN"):
            create_delta(one, other)
    with pytest.raises(CheckpointError, match="word 9 changes"):
        diff_checkpoints(write_evl0(base), write_evl0(current))


def test_half_files_and_other_shapes_are_refused(golden):
    case = golden("delta_row")
    base = case.bytes("base.v1.bin")
    with pytest.raises(CheckpointError, match=r"current: EVL0 version: expected 1 \(f32\)"):
        diff_checkpoints(base, case.bytes("base.v2.bin"))
    other = read_evl0(golden("delta_element").bytes("base.v1.bin"), "other")
    with pytest.raises(CheckpointError, match="vocabSize: expected 12"):
        create_delta(read_evl0(base, "base"), other)
    with pytest.raises(CheckpointError, match="length: expected"):
        diff_checkpoints(base, golden("delta_element").bytes("base.v1.bin"))


def test_a_delta_that_does_not_fit_its_base_is_refused(golden):
    case = golden("delta_row")
    delta = read_delta(case.bytes("delta.evd"), "delta")
    small = read_evl0(golden("delta_element").bytes("base.v1.bin"), "small")
    with pytest.raises(CheckpointError, match="row size: expected a divisor"):
        apply_delta(small, delta)
    beyond = Delta(np.array([4_000_000_000], np.uint32), np.zeros((1, 1), np.float32))
    with pytest.raises(CheckpointError, match="row 4000000000: the base has"):
        apply_delta(small, beyond)


def edited(data, offset, value):
    body = bytearray(data[:-8])
    struct.pack_into("<I", body, offset, value)
    return with_trailer(bytes(body))


def test_damaged_deltas_are_refused(golden):
    data = golden("delta_row").bytes("delta.evd")
    for cut in (0, 4, 15, 16, 23, len(data) - 8, len(data) - 1):
        with pytest.raises(CheckpointError, match="FILE"):
            read_delta(data[:cut], "FILE")
    for offset, value, message in [
        (0, 0, "magic"),
        (4, 2, "version"),
        (8, 0, "row size"),
        (8, 0xFFFFFFFF, "length"),
        (12, 0xFFFFFFFF, "length"),
        (16, 9, "ascending"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_delta(edited(data, offset, value), "FILE")
    changed = bytearray(data)
    changed[40] ^= 1
    with pytest.raises(CheckpointError, match="CRC"):
        read_delta(bytes(changed), "FILE")
