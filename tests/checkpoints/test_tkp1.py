"""`TKP1` checkpoints: what is read, and that nothing in a file is believed unchecked."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from evermind_exporters.checkpoints.tkp1 import Tkp1File
from evermind_manifests.errors import CheckpointError, ClosedError, EvermindPackError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tkp1 import write_tkp1

TENSORS = {
    "router.weight": np.arange(6, dtype=np.float32),
    "router.bias": np.array([0.5, -0.25], np.float32),
    "leer": np.zeros(0, np.float32),
}
GOOD = write_tkp1(TENSORS, configuration='{"größe": 1}', gradients=True)


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "checkpoint.tkp1"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("gradients", [False, True])
def test_weights_by_name(tmp_path: Path, gradients: bool) -> None:
    file = Tkp1File(_file(tmp_path, write_tkp1(TENSORS, step=9, gradients=gradients)))
    assert file.step == 9
    assert file.configuration == "{}"
    assert file.counts == {"router.weight": 6, "router.bias": 2, "leer": 0}
    assert list(file) == list(TENSORS)
    for name, array in TENSORS.items():
        assert np.array_equal(file[name], array)
    file.close()
    with pytest.raises(ClosedError):
        file["router.bias"]


HEAD = struct.pack("<4s4I", b"TKP1", 1, 3, 1, 0)
NAME = struct.pack("<I", 1) + b"w"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "magic: expected 4 bytes, found 0"),
        (b"TKP2" + GOOD[4:], "magic: expected b'TKP1', found b'TKP2'"),
        (b"TKP1" + struct.pack("<I", 2) + GOOD[8:], "version: expected 1, found 2"),
        (GOOD[:12] + struct.pack("<I", 2**32 - 1) + GOOD[16:], "parameter count: expected at most"),
        (GOOD[:12] + struct.pack("<I", 2) + GOOD[16:], "nothing after it, found"),
        (GOOD[:16] + struct.pack("<I", 2**31) + GOOD[20:], "configuration: expected at most"),
        (struct.pack("<4s4I", b"TKP1", 1, 3, 0, 1) + b"\xff", "configuration: expected UTF-8"),
        (HEAD + struct.pack("<I", 5000) + bytes(90), "parameter 0: name: expected at most 4,096"),
        (HEAD + NAME + struct.pack("<I", 2**30) + bytes(90), "'w': weights: expected at most 22"),
        (
            HEAD + NAME + struct.pack("<IfII", 1, 1.0, 0, 2) + bytes(8) + bytes(5),
            "moments or gradient: expected 1 elements, found 2",
        ),
        (
            HEAD + NAME + struct.pack("<IfIIIB", 1, 1.0, 0, 0, 3, 2),
            "has-gradient: expected 0 or 1, found 2",
        ),
        (GOOD + b"\0", "nothing after it, found 1 bytes"),
        (write_tkp1(TENSORS)[:-1], "has-gradient: expected 1 bytes, found 0"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Tkp1File(_file(tmp_path, data))
    assert "checkpoint.tkp1" in str(caught.value)


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    one = write_tkp1({"w": TENSORS["router.bias"]})
    twice = one[:12] + struct.pack("<I", 2) + one[16:] + one[22:]
    with pytest.raises(CheckpointError, match="parameter 1: name: expected one that no other has"):
        Tkp1File(_file(tmp_path, twice))


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_bytes_do_more_than_raise(tmp_path_factory, data: st.DataObject) -> None:
    """Cut, changed or random bytes give the project's errors, or a file that can be read."""
    good = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + 4] = data.draw(st.binary(max_size=6))
        if not good:
            break
    path = _file(tmp_path_factory.mktemp("fuzz"), bytes(good))
    try:
        file = Tkp1File(path)
        assert sum(array.nbytes for array in file.values()) <= len(good)
    except EvermindPackError as error:
        found = str(error)
        if str(path) not in found:
            raise
