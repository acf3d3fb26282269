"""Damaged peer files: a named error each time, never another exception, and little memory.

Every reader is held to it twice, in memory and on disk. What no checksum covers (weights of
MoE0 and LMBC, a manifest's free text) may be read as it stands.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from evermind_exporters.checkpoints import (
    apply_checkpoint_diff,
    apply_delta,
    read_checkpoint,
    read_delta,
    read_evermind,
    read_evl0,
    write_evl0,
)
from evermind_exporters.checkpoints.peer_file import PeerFile
from evermind_exporters.peer_pages import open_peer_file
from evermind_exporters.peer_tokenizer import read_peer_tokenizer
from evermind_exporters.source import read_source
from evermind_manifests.errors import CheckpointError, EvermindPackError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GOLDEN = Path(__file__).parent.parent / "fixtures" / "evermind"
# Offsets that end a header field, and for `.evermind` the manifest, come from the files.
FILES = {
    "moe0-f32": GOLDEN / "moe_small" / "moe.v1.bin",
    "moe0-f16": GOLDEN / "moe_small" / "moe.v2.bin",
    "evl0-f32": GOLDEN / "delta_element" / "base.v1.bin",
    "evl0-f16": GOLDEN / "lm_small" / "lm.v2.bin",
    "evl0-legacy": GOLDEN / "lm_small" / "lm.v1.legacy.bin",
    "lmbc-f32": GOLDEN / "limbic_small" / "limbic.v1.bin",
    "lmbc-f16": GOLDEN / "limbic_small" / "limbic.v2.bin",
    "evermind-moe": GOLDEN / "pkg_moe_f32" / "model.evermind",
    "evermind-lm": GOLDEN / "pkg_lm_fp16" / "model.evermind",
    "evermind-media": GOLDEN / "pkg_media" / "model.evermind",
    "evd0": GOLDEN / "delta_row" / "delta.evd",
}
# Formats in which every byte is covered by a checksum or determined by the length.
COVERED = ["evl0-f32", "evl0-f16", "evd0"]
ON_DISK = [name for name in FILES if name != "evd0"]

EXTREME = (0, 1, 2, 3, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

fuzzing = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_in_memory(name: str, data: bytes) -> object:
    if name == "evd0":
        return read_delta(data, "FILE")
    if name.startswith("evermind"):
        return read_evermind(data, "FILE")
    return read_checkpoint(data, "FILE")


def read_on_disk(path: Path) -> None:
    file = PeerFile(path)
    try:
        file.verify()
        for tensor in file.tensors.values():
            tensor.tobytes()
        file.read_codec()
    finally:
        file.close()


def survives(read: Callable[[], object], size: int) -> bool:
    """Whether `read` worked; it may only fail by name, and not take much memory."""
    tracemalloc.start()
    try:
        read()
        return True
    except CheckpointError:
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Names and offsets of tensors take more than the tensors when these are tiny.
        assert peak < 100 * size + 4 * 2**20


def both(name: str, data: bytes, folder: Path) -> bool:
    """Whether the file is read, in memory and on disk alike."""
    found = survives(lambda: read_in_memory(name, data), len(data))
    if name in ON_DISK:
        path = folder / "file"
        path.write_bytes(data)
        assert survives(lambda: read_on_disk(path), len(data)) == found
    return found


@pytest.mark.parametrize("name", FILES)
def test_truncation_at_every_boundary(name, tmp_path):
    data = FILES[name].read_bytes()
    assert both(name, data, tmp_path)
    edges = {*range(0, 64), *range(64, len(data), 37), *range(len(data) - 48, len(data))}
    if name.startswith("evermind"):
        manifest = 12 + struct.unpack_from("<I", data, 8)[0]
        edges |= set(range(manifest - 4, manifest + 48))
    for cut in sorted(edges):
        read = both(name, data[:cut], tmp_path)
        # An LM file cut exactly before its trailer is the legacy form.
        assert not read or (name in ("evl0-f32", "evl0-f16") and cut == len(data) - 8)


@pytest.mark.parametrize("name", FILES)
def test_extra_bytes(name, tmp_path):
    data = FILES[name].read_bytes()
    for extra in (b"\0", bytes(4), bytes(8), b"\xff" * 100, data):
        # A text package with `checkpointBytes` may have more; these files do not state it.
        assert not both(name, data + extra, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_extreme_words_in_the_header(name, tmp_path):
    data = FILES[name].read_bytes()
    for word in range(12):
        for value in EXTREME:
            changed = bytearray(data)
            struct.pack_into("<I", changed, 4 * word, value)
            both(name, bytes(changed), tmp_path)


@pytest.mark.parametrize("name", ["evermind-moe", "evermind-lm", "evermind-media"])
def test_extreme_words_in_a_packaged_header(name, tmp_path):
    data = FILES[name].read_bytes()
    begin = 12 + struct.unpack_from("<I", data, 8)[0]
    for word in range(9):
        for value in EXTREME:
            changed = bytearray(data)
            struct.pack_into("<I", changed, begin + 4 * word, value)
            if bytes(changed) != data:
                # The manifest's checksum and dimensions both tell; no weight is trusted.
                assert not both(name, bytes(changed), tmp_path)


@pytest.mark.parametrize("name", COVERED)
def test_any_changed_byte_is_noticed(name, tmp_path):
    data = FILES[name].read_bytes()
    for offset in range(0, len(data), max(1, len(data) // 400)):
        for mask in (1, 0x80, 0xFF):
            changed = bytearray(data)
            changed[offset] ^= mask
            assert not both(name, bytes(changed), tmp_path), offset


@pytest.mark.parametrize("name", FILES)
@fuzzing
@given(data=st.data())
def test_random_damage(name, data, tmp_path):
    content = bytearray(FILES[name].read_bytes())
    head = min(len(content), 600)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(("flip", "word", "cut", "insert", "swap")))
        at = data.draw(st.integers(0, head - 1) | st.integers(0, len(content)))
        at = min(at, max(0, len(content) - 4))
        if kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "word":
            content[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from(EXTREME)))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        elif kind == "swap":
            content[:] = content[at:] + content[:at]
    both(name, bytes(content), tmp_path)


@pytest.mark.parametrize("magic", [0x4D6F4530, 0x45564C30, 0x4C4D4243, 0x45564D31, 0x30445645])
@fuzzing
@given(body=st.binary(max_size=200))
def test_a_magic_word_and_any_bytes(magic, body):
    data = struct.pack("<I", magic) + body
    name = {0x30445645: "evd0", 0x45564D31: "evermind"}.get(magic, "plain")
    survives(lambda: read_in_memory(name, data), len(data))


@fuzzing
@given(body=st.binary(max_size=200))
def test_a_delta_of_any_bytes(body):
    base = read_evl0(FILES["evl0-f32"].read_bytes(), "base")
    data = FILES["evd0"].read_bytes()[:16] + body

    def apply() -> None:
        apply_delta(base, read_delta(data, "FILE"))

    assert not survives(apply, len(data))
    assert not survives(lambda: apply_checkpoint_diff(write_evl0(base), data), 4096)


@pytest.mark.parametrize("name", ON_DISK)
def test_loading_a_damaged_file_fails_by_name(name, tmp_path):
    data = FILES[name].read_bytes()
    path = tmp_path / "model"
    for cut in (0, 3, 4, 11, 12, 24, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        for opener in (open_peer_file, read_source):
            with pytest.raises(EvermindPackError, match="model"):
                opener(path)


def test_a_memory_bomb_is_refused_before_it_is_built(tmp_path):
    # A manifest of enormous dimensions, and headers that agree with it.
    dims = (2**31, 2**31, 2**20, 1)
    manifest = {
        "schema": "evermind.model/1",
        "modelType": "shared-expert-moe",
        "config": dict(zip(("modelDim", "hiddenDim", "numExperts", "topK"), dims, strict=True)),
        "checksum": 0,
    }
    text = json.dumps(manifest).encode()
    header = struct.pack("<6I", 0x4D6F4530, 1, *dims)
    data = struct.pack("<3I", 0x45564D31, 1, len(text)) + text + header + bytes(64)
    assert not both("evermind", data, tmp_path)
    (tmp_path / "model").write_bytes(data)
    assert not survives(lambda: open_peer_file(tmp_path / "model"), len(data))
    # Many experts of one parameter each: as many as the file has room for, and no more.
    many = struct.pack("<6I", 0x4D6F4530, 1, 1, 1, 2**32 - 1, 1)
    assert not both("moe0", many + bytes(4096), tmp_path)


@fuzzing
@given(data=st.data())
def test_a_damaged_bundle_fails_by_name(data, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = bytearray((GOLDEN / "export_lm" / name).read_bytes())
        limit = len(content) if name != "model.safetensors" else 3000
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(0, limit - 1))
            content[at] = data.draw(st.integers(0, 255))
        (tmp_path / name).write_bytes(content)
    with suppress(EvermindPackError):
        read_source(tmp_path)


@fuzzing
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["model", "vocab", "merges", "a", "b"]), inner)
        ),
        max_leaves=12,
    )
)
def test_any_json_as_a_tokenizer(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    path.write_text(json.dumps(value))
    with suppress(EvermindPackError):
        read_peer_tokenizer(path)
