"""fp8 and mxfp4 checkpoints: their numbers are transformers' own, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_exporters.huggingface.checkpoint import Checkpoint, Rows
from evermind_exporters.huggingface.quantized import open_checkpoint
from evermind_manifests.errors import CheckpointError, ConfigError, UnsupportedError
from evermind_manifests.package import open_package

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def write(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def bits_of(tensor: Any) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.contiguous().view(torch.uint16).numpy())
    return np.asarray(tensor.contiguous().numpy())


def every_code(rows: int, width: int) -> Any:
    """E4M3 codes without the two NaNs."""
    codes = torch.arange(rows * width, dtype=torch.int64) * 37 % 256
    codes[codes % 128 == 127] = 3
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).reshape(rows, width)


def fp8_reference(codes: Any, scales: Any, dtype: Any) -> np.ndarray[Any, Any]:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return bits_of(Fp8Dequantize(None)._dequantize_one(codes, scales, dtype))


@pytest.mark.parametrize("grid", [(3, 2), (1, 1), (48, 1), (0, 0)])
def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path, grid: tuple[int, int]) -> None:
    """By blocks, for a whole matrix, by rows, and with a scale that is no matrix."""
    codes = every_code(48, 32)
    generator = torch.Generator().manual_seed(5)
    scales = torch.rand(grid if grid[0] else (), generator=generator) * 1e-3
    folder = write(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales}, quant_method="fp8")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names == ["a.weight"]
    assert checkpoint.dtype("a.weight") == "f32"
    assert checkpoint.shape("a.weight") == (48, 32)
    expected = fp8_reference(codes, scales.reshape(grid if grid[0] else (1, 1)), torch.float32)
    found = checkpoint.read(Rows("a.weight", None, 0, 48))
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(checkpoint.read(Rows("a.weight", None, 7, 20)), expected[7:20])
    flat = expected.reshape(-1)
    for begin, end in ((0, flat.size), (5, 6), (31, 33), (700, 1100)):
        np.testing.assert_array_equal(checkpoint.values("a.weight", begin, end), flat[begin:end])


def test_fp8_with_short_scales_is_exact_in_bfloat16(tmp_path: Path) -> None:
    codes = every_code(16, 64)
    scales = torch.tensor([[0.5, 2.0**-20, 1.25, 60.0]])
    folder = write(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales}, quant_method="fp8")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype("a.weight") == "bf16"
    wide = fp8_reference(codes, scales, torch.float32)
    found = checkpoint.read(Rows("a.weight", None, 0, 16))
    np.testing.assert_array_equal(found.astype(np.uint32) << 16, wide.view(np.uint32))


def test_fp8_blocks_at_the_edge_may_be_smaller(tmp_path: Path) -> None:
    codes, scales = every_code(24, 40), torch.rand(2, 3)
    folder = write(
        tmp_path,
        {"a.weight": codes, "a.weight_scale_inv": scales},
        quant_method="fp8",
        weight_block_size=[16, 16],
    )
    spread = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)[:24, :40]
    expected = (codes.float() * spread).numpy()
    found = open_checkpoint(folder).read(Rows("a.weight", None, 0, 24))
    np.testing.assert_array_equal(found, expected)


def test_fp8_stacks_and_scales_of_one_byte(tmp_path: Path) -> None:
    """mxfp8: powers of two for 32 numbers; gate and up of all experts in one tensor."""
    codes = torch.stack([every_code(8, 64), every_code(8, 64).flip(0)])
    scales = torch.randint(100, 140, (2, 8, 2), dtype=torch.uint8)
    folder = write(tmp_path, {"e.up": codes, "e.up_scale_inv": scales}, quant_method="mxfp8")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype("e.up") == "bf16"
    expected = fp8_reference(codes, scales, torch.bfloat16)
    np.testing.assert_array_equal(checkpoint.read(Rows("e.up", 1, 2, 8)), expected[1, 2:])
    np.testing.assert_array_equal(
        checkpoint.read(Rows("e.up", 1, 3, 9, transposed=True)), expected[1].T[3:9]
    )
    flat = expected.reshape(-1)
    np.testing.assert_array_equal(checkpoint.values("e.up", 300, 700), flat[300:700])


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """Every byte under every scale that gives finite numbers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = (torch.arange(2 * 16 * 8 * 16) % 256).to(torch.uint8).reshape(2, 16, 8, 16)
    scales = (torch.arange(2 * 16 * 8) % 253).to(torch.uint8).reshape(2, 16, 8)
    folder = write(tmp_path, {"e.up_blocks": blocks, "e.up_scales": scales}, quant_method="mxfp4")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names == ["e.up"]
    assert checkpoint.dtype("e.up") == "bf16"
    expected = bits_of(convert_moe_packed_tensors(blocks, scales))
    assert checkpoint.shape("e.up") == expected.shape == (2, 256, 16)
    for expert in (0, 1):
        found = checkpoint.read(Rows("e.up", expert, 0, 16, transposed=True))
        np.testing.assert_array_equal(found, expected[expert].T)
        np.testing.assert_array_equal(
            checkpoint.read(Rows("e.up", expert, 30, 40)), expected[expert, 30:40]
        )
    flat = expected.reshape(-1)
    np.testing.assert_array_equal(checkpoint.values("e.up", 4000, 5000), flat[4000:5000])
    wide = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    np.testing.assert_array_equal(expected.astype(np.uint32) << 16, wide.view(np.uint32))


@pytest.mark.parametrize("scale", [254, 255])
def test_numbers_that_are_too_large_are_refused(tmp_path: Path, scale: int) -> None:
    blocks = torch.full((1, 1, 1, 16), 0x77, dtype=torch.uint8)
    scales = torch.full((1, 1, 1), scale, dtype=torch.uint8)
    folder = write(tmp_path, {"e_blocks": blocks, "e_scales": scales}, quant_method="mxfp4")
    with pytest.raises(CheckpointError, match="infinite"):
        open_checkpoint(folder).read(Rows("e", 0, 0, 1, transposed=True))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    codes = every_code(48, 32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"a.weight": codes}, "expected its scales"),
        ({"a.weight": codes, "a.weight_scale_inv": torch.ones(5, 2)}, "divide"),
        ({"a.weight": codes, "a.weight_scale_inv": torch.ones(2, 3, 2)}, "expected scales"),
    ]
    for number, (tensors, message) in enumerate(cases):
        folder = write(tmp_path / str(number), tensors, quant_method="fp8")
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)
    folder = write(tmp_path / "awq", {"a": torch.ones(2)}, quant_method="awq")
    with pytest.raises(UnsupportedError, match="awq"):
        open_checkpoint(folder)
    folder = write(
        tmp_path / "short",
        {
            "a_blocks": torch.ones(1, 2, 2, 8, dtype=torch.uint8),
            "a_scales": torch.ones(1, 2, 2, dtype=torch.uint8),
        },
        quant_method="mxfp4",
    )
    with pytest.raises(CheckpointError, match="blocks of 16"):
        open_checkpoint(folder)


def test_a_checkpoint_that_is_not_quantized_is_read_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": torch.ones(2)})
    assert type(open_checkpoint(folder)) is Checkpoint


def as_fp8(tensors: dict[str, Any], block: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Matrices of layers as DeepSeek-V3 stores them, and what transformers makes of that."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, numbers = {}, {}
    for name, one in tensors.items():
        codes[name] = numbers[name] = one
        if not name.endswith("_proj.weight"):
            continue
        height, width = (size // block for size in one.shape)
        scales = one.float().reshape(height, block, width, block).abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
        codes[name] = (one.float() / spread).to(torch.float8_e4m3fn)
        codes[f"{name}_scale_inv"] = scales
        numbers[name] = Fp8Dequantize(None)._dequantize_one(codes[name], scales, torch.float32)
    return codes, numbers


def as_mxfp4(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random experts as gpt-oss stores them, and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(11)
    codes, numbers = {}, {}
    for name, one in tensors.items():
        codes[name] = numbers[name] = one
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, rows = one.shape
            shape = (experts, rows, width // 32, 16)
            blocks = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 126, shape[:-1], generator=generator, dtype=torch.uint8)
            del codes[name]
            codes |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            numbers[name] = convert_moe_packed_tensors(blocks, scales)
    return codes, numbers


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_a_quantized_checkpoint_runs_as_transformers_runs_its_numbers(
    tmp_path: Path, method: str, request: pytest.FixtureRequest
) -> None:
    import evermind_runtime
    from evermind_exporters.huggingface.import_ import import_checkpoint
    from evermind_exporters.huggingface.restore import restore_checkpoint
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from .tiny import ARCHITECTURES, CARRIED, make

    if method == "fp8" and not request.config.getoption("--every-architecture"):
        pytest.skip("fp8 is imported with --every-architecture; its numbers are tested above")
    source, plain = tmp_path / "quantized", tmp_path / "plain"
    if method == "fp8":
        make(source, "deepseek_v3", dtype="bfloat16", form=CARRIED["deepseek_v3"])
        codes, numbers = as_fp8(load_file(source / "model.safetensors"), block=8)
    else:
        form = {**ARCHITECTURES["gpt_oss"], "intermediate_size": 32, "num_hidden_layers": 1}
        make(source, "gpt_oss", form={**form, "layer_types": ["full_attention"]})
        codes, numbers = as_mxfp4(load_file(source / "model.safetensors"))
    plain.mkdir()
    config = json.loads((source / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config))
    save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {"quant_method": method, "weight_block_size": [8, 8]}
    (source / "config.json").write_text(json.dumps(config))
    save_file(codes, source / "model.safetensors", metadata={"format": "pt"})

    import_checkpoint(source, tmp_path / "package")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    tokens = np.random.default_rng(2).integers(0, 96, 24)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    with evermind_runtime.load(tmp_path / "package") as package:
        found = package.forward({"tokens": tokens})["logits"]
    assert np.abs(expected - found).max() <= 5e-5 * np.abs(expected).max()
    with (
        open_package(tmp_path / "package") as opened,
        pytest.raises(ConfigError, match="quantised"),
    ):
        restore_checkpoint(opened, tmp_path / "back")
    manifest = json.loads((tmp_path / "package/manifest.json").read_text())
    assert "quantization_config" not in manifest["config"]
    (kind,) = manifest["kinds"].values()
    expected_dtype = {"fp8": {"f32"}, "mxfp4": {"bf16", "f32"}}[method]
    assert {tensor["dtype"] for tensor in kind["tensors"]} == expected_dtype
