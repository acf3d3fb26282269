"""The CUDA device: slots in device memory, page-ins through a staging buffer."""

from __future__ import annotations

from pathlib import Path

import evermind_runtime as em
import numpy as np
import onnxruntime as ort
import pytest
from evermind_manifests.errors import DeviceError
from evermind_runtime.devices import _Staging

HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()
needs_cuda = pytest.mark.skipif(
    not HAS_CUDA, reason="this ONNX Runtime has no CUDA provider (install evermind-pack[cuda])"
)


@needs_cuda
@pytest.mark.parametrize("budget", ["25%", "100%"])
@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_cuda_agrees_with_cpu(lm_package: Path, budget: str, steps: str) -> None:
    tokens = {"tokens": np.arange(40)}
    with em.load(lm_package) as cpu, em.load(lm_package, device="cuda", budget=budget) as cuda:
        expected = cpu.forward(tokens, steps=steps)  # type: ignore[arg-type]
        found = cuda.forward(tokens, steps=steps)  # type: ignore[arg-type]
        scale = np.abs(expected["logits"]).max()
        # TF32 is off by default; the order of sums differs.
        assert np.abs(found["logits"] - expected["logits"]).max() <= 1e-4 * scale
        assert cuda.stats().peak_resident_expert_bytes <= cuda.budget


@needs_cuda
def test_cuda_generates_the_same_tokens(lm_package: Path) -> None:
    with em.load(lm_package) as cpu, em.load(lm_package, device="cuda", budget="25%") as cuda:
        expected = [piece.token for piece in cpu.generate([1, 2], max_new_tokens=30)]
        assert [piece.token for piece in cuda.generate([1, 2], max_new_tokens=30)] == expected


def test_readers_at_work_at_once_have_staging_buffers_of_their_own() -> None:
    staging = _Staging()
    with staging.borrow(4096) as one, staging.borrow(4096) as other:
        assert not np.shares_memory(one, other)
    with staging.borrow(4096) as again:
        assert np.shares_memory(again, one) or np.shares_memory(again, other)


@pytest.mark.skipif(HAS_CUDA, reason="a CUDA provider is there")
def test_without_cuda_the_device_is_refused(lm_package: Path) -> None:
    with pytest.raises(DeviceError, match=r"evermind-pack\[cuda\]"):
        em.load(lm_package, device="cuda")
