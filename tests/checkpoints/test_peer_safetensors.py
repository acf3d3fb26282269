"""The peer's safetensors and GGUF exports, byte for byte."""

from __future__ import annotations

import pytest
from evermind_exporters.checkpoints import (
    read_evl0,
    read_moe0,
    write_peer_gguf,
    write_peer_safetensors,
)
from evermind_manifests.errors import CheckpointError


def test_golden_export(golden):
    case = golden("export_lm")
    checkpoint = read_evl0(case.bytes("lm.v1.bin"), "lm")
    for half, name in ((False, "model.safetensors"), (True, "model.f16.safetensors")):
        assert write_peer_safetensors(checkpoint, half) == case.bytes(name)


def test_golden_gguf(golden):
    case = golden("export_lm")
    checkpoint = read_evl0(case.bytes("lm.v1.bin"), "lm")
    for half, name in ((False, "model.gguf"), (True, "model.f16.gguf")):
        assert write_peer_gguf(checkpoint, half, name="Tiny") == case.bytes(name)


def test_metadata_is_appended(golden):
    checkpoint = read_evl0(golden("export_lm").bytes("lm.v1.bin"), "lm")
    data = write_peer_safetensors(checkpoint, metadata={"note": "Zoë"})
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert '"builderforce-memory-engine","note":"Zoë"}' in data[8 : 8 + length].decode()


def test_only_language_models(golden):
    moe = read_moe0(golden("moe_small").bytes("moe.v1.bin"), "moe")
    for write in (write_peer_safetensors, write_peer_gguf):
        with pytest.raises(CheckpointError, match="exports only 'evermind-lm'"):
            write(moe)
