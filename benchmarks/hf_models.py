"""Random Hugging Face checkpoints, and one's weights as the GGUF file that llama.cpp reads.

They are written tensor by tensor: no process holds more of one than a matrix. Every weight is one
that bfloat16 and float16 both hold exactly, so that no side computes with other weights than
another, whatever it stores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .common import random_values

DType = np.dtype[Any]
#: The configuration, and the shapes of all tensors by name.
Form: TypeAlias = "tuple[dict[str, Any], dict[str, tuple[int, ...]]]"

MID = {
    "vocabulary": 32000, "width": 512, "layers": 8, "heads": 8,
    "experts": 16, "top_k": 2, "hidden": 1024,
}  # fmt: skip
BIG = {
    "vocabulary": 32000, "width": 1024, "layers": 12, "heads": 16,
    "experts": 32, "top_k": 2, "hidden": 1024,
}  # fmt: skip
TINY = {
    "vocabulary": 500, "width": 64, "layers": 2, "heads": 4,
    "experts": 32, "top_k": 2, "hidden": 256,
}  # fmt: skip
KV_HEADS, HEAD_WIDTH, CONTEXT = 4, 64, 4096
EPSILON, ROPE_BASE = 1e-6, 1e4
# Wide enough for logits that differ, narrow enough for values that stay finite.
_SCALE = 0.04
# bfloat16 has 8 bits of precision; down to here float16 holds all of them.
_LEAST = 2.0**-16
_FILE_BYTES = 10**9


def write_checkpoint(
    folder: str, dims: dict[str, int], form: str = "qwen3_moe", dtype: str = "f16"
) -> int:
    """A checkpoint of one of `FORMS` in files of about 1 GB; returns how many parameters it has."""
    from evermind_exporters.resident import Stored, TensorFile

    path = Path(folder)
    path.mkdir()
    config, shapes = FORMS[form](dims)
    files: list[dict[str, Stored]] = [{}]
    room = _FILE_BYTES
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if size > room and files[-1]:
            files.append({})
            room = _FILE_BYTES
        files[-1][name] = Stored(dtype, shape)  # type: ignore[arg-type]
        room -= size
    seeds = {name: seed for seed, name in enumerate(shapes)}

    def read(name: str) -> Iterator[bytes]:
        yield _stored(shapes[name], seeds[name], dtype).tobytes()

    places: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        places |= dict.fromkeys(tensors, file)
        with (path / file).open("wb") as output:
            for part in TensorFile(tensors).parts(read):
                output.write(part)
    total = sum(map(math.prod, shapes.values()))
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config["torch_dtype"] = {"f16": "float16", "bf16": "bfloat16"}[dtype]
    (path / "config.json").write_text(json.dumps(config))
    return total


def _stored(shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray[Any, DType]:
    """Random weights as stored; vectors, which are norms, are 1."""
    if len(shape) == 1:
        values = np.ones(shape, np.float32)
    else:
        values = random_values(shape, seed, _SCALE)
        values[np.abs(values) < _LEAST] = 0
    high = values.view(np.uint32) >> np.uint32(16)
    if dtype == "bf16":
        return high.astype(np.uint16)
    return (high << np.uint32(16)).view(np.float32).astype(np.float16)


def _qwen3_moe(dims: dict[str, int]) -> Form:
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_WIDTH,
        "moe_intermediate_size": dims["hidden"],
        "norm_topk_prob": True,
        "rms_norm_eps": EPSILON,
    }
    inner, outer = dims["heads"] * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH
    return _form(config, dims, (inner, outer), (HEAD_WIDTH, HEAD_WIDTH))


def _olmoe(dims: dict[str, int]) -> Form:
    config = {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_key_value_heads": dims["heads"],
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
    }
    width = dims["width"]
    return _form(config, dims, (width, width), (width, width))


FORMS = {"qwen3_moe": _qwen3_moe, "olmoe": _olmoe}


def _form(
    config: dict[str, Any], dims: dict[str, int], heads: tuple[int, int], norms: tuple[int, int]
) -> Form:
    """Configuration, and every tensor in the order of the files.

    `heads` are the widths of all queries and of all keys, `norms` those of their norms.
    """
    width, hidden = dims["width"], dims["hidden"]
    queries, keys = heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (dims["vocabulary"], width)}
    for layer in range(dims["layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.self_attn.q_proj.weight"] = queries, width
        shapes[f"{prefix}.self_attn.k_proj.weight"] = keys, width
        shapes[f"{prefix}.self_attn.v_proj.weight"] = keys, width
        shapes[f"{prefix}.self_attn.o_proj.weight"] = width, queries
        shapes[f"{prefix}.self_attn.q_norm.weight"] = (norms[0],)
        shapes[f"{prefix}.self_attn.k_norm.weight"] = (norms[1],)
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{prefix}.mlp.gate.weight"] = dims["experts"], width
        for expert in range(dims["experts"]):
            place = f"{prefix}.mlp.experts.{expert}"
            shapes[f"{place}.gate_proj.weight"] = hidden, width
            shapes[f"{place}.up_proj.weight"] = hidden, width
            shapes[f"{place}.down_proj.weight"] = width, hidden
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (dims["vocabulary"], width)}
    config |= {
        "vocab_size": dims["vocabulary"],
        "hidden_size": width,
        "num_hidden_layers": dims["layers"],
        "num_attention_heads": dims["heads"],
        "intermediate_size": hidden,
        "num_experts": dims["experts"],
        "num_experts_per_tok": dims["top_k"],
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "tie_word_embeddings": False,
    }
    return config, shapes


def write_gguf(folder: str, file: str, dims: dict[str, int]) -> None:
    """The checkpoint in `folder` as a float16 GGUF file of the architecture `qwen3moe`.

    Norms and routers are float32, as llama.cpp's own converter has them. There is no tokenizer.
    """
    import gguf

    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_block_count(dims["layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(dims["width"])
    writer.add_feed_forward_length(dims["hidden"])
    writer.add_expert_feed_forward_length(dims["hidden"])
    writer.add_expert_count(dims["experts"])
    writer.add_expert_used_count(dims["top_k"])
    writer.add_head_count(dims["heads"])
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_vocab_size(dims["vocabulary"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    for name, array in _gguf_tensors(_Tensors(Path(folder)), dims):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(
    found: _Tensors, dims: dict[str, int]
) -> Iterator[tuple[str, np.ndarray[Any, DType]]]:
    yield "token_embd.weight", found("model.embed_tokens.weight", np.float16)
    yield "output_norm.weight", found("model.norm.weight", np.float32)
    yield "output.weight", found("lm_head.weight", np.float16)
    for layer in range(dims["layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for here, there, dtype in (
            ("input_layernorm", "attn_norm", np.float32),
            ("self_attn.q_proj", "attn_q", np.float16),
            ("self_attn.k_proj", "attn_k", np.float16),
            ("self_attn.v_proj", "attn_v", np.float16),
            ("self_attn.o_proj", "attn_output", np.float16),
            ("self_attn.q_norm", "attn_q_norm", np.float32),
            ("self_attn.k_norm", "attn_k_norm", np.float32),
            ("post_attention_layernorm", "ffn_norm", np.float32),
            ("mlp.gate", "ffn_gate_inp", np.float32),
        ):
            yield f"{theirs}.{there}.weight", found(f"{ours}.{here}.weight", dtype)
        for kind in ("gate", "up", "down"):
            stacked = [
                found(f"{ours}.mlp.experts.{expert}.{kind}_proj.weight", np.float16)
                for expert in range(dims["experts"])
            ]
            yield f"{theirs}.ffn_{kind}_exps.weight", np.stack(stacked)


class _Tensors:
    """A checkpoint's tensors by name, in float16 or widened."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __call__(self, name: str, dtype: type[np.floating[Any]]) -> np.ndarray[Any, DType]:
        import torch

        tensor = self._files[name].get_tensor(name)
        wanted = {np.float16: torch.float16, np.float32: torch.float32}[dtype]
        result: np.ndarray[Any, DType] = tensor.to(wanted).numpy()
        return result
