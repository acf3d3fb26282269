"""`.evermind`: golden packages byte for byte, the peer's verdicts, and where we are stricter."""

from __future__ import annotations

import copy
import json
import struct

import pytest
from evermind_exporters.checkpoints import (
    new_peer_manifest,
    parse_peer_manifest,
    read_evermind,
    read_evl0,
    read_moe0,
    write_evermind,
    write_evl0,
)
from evermind_exporters.checkpoints.fnv import fnv1a
from evermind_exporters.checkpoints.peer_manifest import encode
from evermind_manifests.errors import CheckpointError, ConfigError
from evermind_manifests.manifest import Card
from hypothesis import given
from hypothesis import strategies as st

CASES = ["pkg_moe_f32", "pkg_moe_fp16", "pkg_lm_f32", "pkg_lm_fp16", "pkg_media"]


def blob(manifest, rest: bytes, *, version: int = 1) -> bytes:
    text = manifest if isinstance(manifest, bytes) else encode(manifest).encode()
    return struct.pack("<3I", 0x45564D31, version, len(text)) + text + rest


def apply_edit(case, edit) -> bytes:
    """A golden edit, as specs/evermind-formats.md 17.2 describes them."""
    data = case.bytes("model.evermind")
    patch = edit.get("manifest_patch")
    if patch is not None:
        manifest = copy.deepcopy(case.json["manifest"])
        for key, value in patch.items():
            manifest[key] = value
            if value is None:
                del manifest[key]
        data = blob(manifest, data[12 + case.json["layout"]["manifest_bytes"] :])
    changed = bytearray(data + bytes(edit.get("append_zeros", 0)))
    for offset, value in edit.get("xor", []):
        changed[offset] ^= value
    return bytes(changed[: edit.get("truncate_to", len(changed))])


@pytest.mark.parametrize("name", CASES)
def test_golden_package_is_read_and_written_back(golden, name):
    case = golden(name)
    data = case.bytes("model.evermind")
    file = read_evermind(data, name)
    assert file.manifest.text == case.json["manifest_text"]
    assert list(file.manifest.values) == list(case.json["manifest"])
    half = case.json["manifest"]["checkpointFp16"]
    assert file.checkpoint.half == half
    assert len(file.codec) == case.json["layout"]["codec_bytes"]
    assert write_evermind(file.checkpoint, file.manifest, half=half, codec=file.codec) == data


@pytest.mark.parametrize("name", CASES)
def test_what_the_peer_refuses_is_refused(golden, name):
    case = golden(name)
    accepted = 0
    for edit in case.json["edits"]:
        data = apply_edit(case, edit)
        outcome = edit["outcome"]
        stricter = edit["name"] == "package version 99 is not checked"
        if outcome.get("load") == "ok" and not stricter:
            file = read_evermind(data, "FILE")
            assert (
                write_evermind(
                    file.checkpoint, file.manifest, half=file.checkpoint.half, codec=file.codec
                )
                == data
            )
            accepted += 1
        else:
            with pytest.raises(CheckpointError, match="FILE"):
                read_evermind(data, "FILE")
    assert accepted


def test_the_media_codec_is_carried_through(golden):
    case = golden("pkg_media")
    assert read_evermind(case.bytes("model.evermind"), "m").codec == case.bytes("codec.vrq")


def test_a_fresh_package_has_the_peers_bytes(golden):
    for name in CASES[:4]:
        case = golden(name)
        meta = case.json["meta"]
        card = meta["card"]
        file = read_evermind(case.bytes("model.evermind"), name)
        manifest = new_peer_manifest(
            file.checkpoint.family,
            case.json["config"],
            name=meta["name"],
            version=meta["version"],
            card=Card(
                description=card["description"],
                training_summary=card["trainingSummary"],
                license=card["license"],
                author=card["author"],
                tags=tuple(card["tags"]),
            ),
            created=meta["createdAt"],
        )
        made = write_evermind(file.checkpoint, manifest, half=meta["fp16"])
        assert made == case.bytes("model.evermind")


def test_a_changed_precision_changes_the_manifest_and_nothing_else_in_it(golden):
    full = read_evermind(golden("pkg_lm_f32").bytes("model.evermind"), "m")
    assert write_evermind(full.checkpoint, full.manifest, half=True) == golden("pkg_lm_fp16").bytes(
        "model.evermind"
    )


def test_a_package_from_before_the_crc_trailer_comes_back(golden):
    file = read_evermind(golden("pkg_lm_f32").bytes("model.evermind"), "m")
    old = write_evermind(file.checkpoint, file.manifest, trailer=False)
    again = read_evermind(old, "old")
    assert write_evermind(again.checkpoint, again.manifest, trailer=False) == old
    assert write_evermind(again.checkpoint, again.manifest) == write_evermind(
        file.checkpoint, file.manifest
    )


# What the peer lets pass: (key, value) in the manifest, and what we say.
FORGOTTEN = [
    ("paramCount", 1091, "paramCount: expected 1092, found 1091"),
    ("paramCount", "1092", "paramCount: expected int"),
    ("checkpointFormat", "EVL0", "checkpointFormat: expected 'MoE0'"),
    ("checkpointFp16", True, "checkpointFp16: expected False"),
    ("checkpointBytes", 10**9, "checkpointBytes"),
    ("checkpointBytes", -1, "checkpointBytes"),
    ("checksum", -727181795, "checksum: expected an unsigned"),
    ("checksum", "3567785501", "checksum: expected an unsigned"),
    ("modality", "smell", "modality: expected text, video, image"),
    ("modality", ["image"], "modality"),
    ("modelType", ["x"], "modelType"),
    ("name", 5, "name: expected str"),
    ("card", [], "card: expected dict"),
    ("card", {"description": "x", "tags": "a"}, "tags: expected a list"),
    ("config", {"modelDim": 8, "hiddenDim": 12, "numExperts": 4}, "topK: expected a dimension"),
    ("config", {"modelDim": 8, "hiddenDim": 12, "numExperts": 4, "topK": 2.0}, "topK"),
    ("config", {"modelDim": 2**31, "hiddenDim": 12, "numExperts": 4, "topK": 2}, "modelDim: exp"),
    ("config", {"modelDim": 8, "hiddenDim": 12, "numExperts": 4, "topK": 1}, "topK: expected 2"),
    ("config", [8, 12, 4, 2], "config: expected an object"),
]


@pytest.mark.parametrize(("key", "value", "message"), FORGOTTEN)
def test_what_the_peer_forgets_to_check(golden, key, value, message):
    case = golden("pkg_moe_f32")
    rest = case.bytes("model.evermind")[case.json["layout"]["checkpoint_offset"] :]
    manifest = case.json["manifest"] | {key: value}
    with pytest.raises(CheckpointError, match=message):
        read_evermind(blob(manifest, rest), "FILE")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "manifest"),
        (b"[]", "expected a JSON object"),
        (b"\xff{}", "manifest"),
        (b"\xef\xbb\xbf{}", "manifest"),
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":' + b"9" * 5000 + b"}", "64 bits"),
        (b'{"a":"\\ud800"}', "surrogates"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "levels deep"),
        (b'{"a":' * 100_000, "manifest"),
        (b"[" * 100_000, "manifest"),
    ],
)
def test_a_manifest_that_is_no_manifest(text, message):
    with pytest.raises(CheckpointError, match=message):
        read_evermind(blob(text, b""), "FILE")


def test_the_whole_file_is_accounted_for(golden):
    data = golden("pkg_moe_f32").bytes("model.evermind")
    with pytest.raises(CheckpointError, match="container version: expected 1, found 2"):
        read_evermind(data[:4] + b"\2" + data[5:], "FILE")
    for length in (len(data), 2**32 - 1):
        with pytest.raises(CheckpointError, match="bytes are stated"):
            read_evermind(data[:8] + struct.pack("<I", length) + data[12:], "FILE")


def test_extra_bytes_need_a_stated_checkpoint_length_and_survive(golden):
    case = golden("pkg_moe_f32")
    rest = case.bytes("model.evermind")[case.json["layout"]["checkpoint_offset"] :]
    manifest = case.json["manifest"] | {"checkpointBytes": len(rest)}
    data = blob(manifest, rest + b"extra")
    file = read_evermind(data, "FILE")
    assert file.codec == b"extra"
    assert write_evermind(file.checkpoint, file.manifest, codec=file.codec) == data


def test_a_media_model_needs_its_codec(golden):
    file = read_evermind(golden("pkg_media").bytes("model.evermind"), "m")
    with pytest.raises(CheckpointError, match="codec section is missing"):
        write_evermind(file.checkpoint, file.manifest)
    moe = read_moe0(golden("moe_small").bytes("moe.v1.bin"), "moe")
    with pytest.raises(CheckpointError, match="modelType: expected"):
        write_evermind(moe, file.manifest)


def test_the_limbic_family_has_no_package():
    with pytest.raises(ConfigError, match="not limbic"):
        new_peer_manifest("limbic", {}, name="n", version="1", card=Card(), created=None)


def test_an_lm_package_may_hold_a_checkpoint_without_trailer(golden):
    case = golden("pkg_lm_f32")
    legacy = write_evl0(read_evermind(case.bytes("model.evermind"), "m").checkpoint, trailer=False)
    file = read_evermind(blob(case.json["manifest"] | {"checksum": fnv1a(legacy)}, legacy), "old")
    assert write_evl0(file.checkpoint, trailer=False) == legacy
    read_evl0(legacy, "legacy")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.text(min_size=1, max_size=12), JSON, max_size=5), st.booleans())
def test_unknown_keys_survive_changes(extra, spaced):
    known = new_peer_manifest(
        "shared-expert-moe", {"seed": -1}, name="n", version="1", card=Card(), created=None
    ).values
    values = {key: value for key, value in extra.items() if key not in known} | dict(known)
    text = json.dumps(values, ensure_ascii=False) if spaced else encode(values)
    manifest = parse_peer_manifest(text.encode(), "m")
    assert manifest.update({"paramCount": 0}) is manifest
    assert manifest.with_card(manifest.card) is manifest
    changed = manifest.update({"paramCount": 7}).with_card(Card(author="Zoë"))
    expected = {**values, "paramCount": 7, "card": {"description": "", "author": "Zoë"}}
    assert changed.text == encode(expected)
