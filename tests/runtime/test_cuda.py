"""The CUDA device: slots in device memory, page-ins through a staging buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import onnxruntime as ort
import pytest
from evermind_manifests.errors import DeviceError
from evermind_manifests.package import open_package
from evermind_runtime import devices
from evermind_runtime import model as model_module
from evermind_runtime.devices import CpuDevice, CudaDevice, _Staging
from evermind_runtime.parity import parity_problems

from tests.packages import export, golden_source

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
        # CudaDevice turns TF32 off; the order of sums differs.
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


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return export(golden_source("lm_small"), tmp_path / "lm", parity=True, dtype="f32")


@pytest.fixture
def built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime that was built for CUDA, on a machine without a GPU."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)


@pytest.mark.skipif(HAS_CUDA, reason="a CUDA provider is there")
@pytest.mark.usefixtures("built_for_cuda")
def test_a_build_for_cuda_is_no_gpu(package: Path) -> None:
    with pytest.raises(DeviceError, match="'cuda:3'") as caught:
        em.load(package, device="cuda:3")
    assert "driver" in str(caught.value.hint)
    assert "evermind-pack[cuda]" in str(caught.value.hint)
    with open_package(package) as opened, pytest.raises(DeviceError):
        parity_problems(opened, "cuda")


@pytest.mark.usefixtures("built_for_cuda")
def test_libraries_are_loaded_before_the_device_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Any] = []

    def preload() -> None:
        print("Failed to load libcudnn.so.9")
        done.append("libraries")

    monkeypatch.setattr(ort, "preload_dlls", preload)
    monkeypatch.setattr(devices, "_cuda_memory", lambda size, index: done.append(index))
    (_, options), cpu = CudaDevice(1).providers
    assert done == ["libraries", 1]
    assert capsys.readouterr().out == ""  # where --json prints
    assert (options["device_id"], options["use_tf32"], cpu) == ("1", "0", "CPUExecutionProvider")
    monkeypatch.setattr(ort, "preload_dlls", lambda: 1 / 0)
    with pytest.raises(DeviceError, match="division"):
        CudaDevice()


class Nowhere(CpuDevice):
    """A device whose provider ONNX Runtime leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "cuda:0"
        self.providers = [("CUDAExecutionProvider", {"device_id": "0"}), "CPUExecutionProvider"]


@pytest.mark.skipif(HAS_CUDA, reason="a CUDA provider is there")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_the_cpu_does_not_stand_in_for_a_device(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "open_device", lambda _: Nowhere())
    with (
        em.load(package, device="cuda", plan="paged") as model,
        pytest.raises(DeviceError, match="expected CUDAExecutionProvider on device 'cuda:0'"),
    ):
        model.forward({"tokens": [1, 2]})
    with open_package(package) as opened, pytest.raises(DeviceError, match="found CPU"):
        parity_problems(opened, "cuda")
