"""A random Qwen3-MoE checkpoint, and the same weights as the GGUF file that llama.cpp reads.

Every weight is one that bfloat16 and float16 both hold exactly, so that no side computes with
other weights than another, whatever it stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .common import random_values

DType = np.dtype[Any]

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


def write_checkpoint(folder: str, dims: dict[str, int]) -> int:
    """Save a float16 checkpoint as transformers does; returns how many parameters it has."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen3MoeConfig(
        vocab_size=dims["vocabulary"],
        hidden_size=dims["width"],
        num_hidden_layers=dims["layers"],
        num_attention_heads=dims["heads"],
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_WIDTH,
        intermediate_size=dims["hidden"],
        moe_intermediate_size=dims["hidden"],
        num_experts=dims["experts"],
        num_experts_per_tok=dims["top_k"],
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=False,
        dtype=torch.float16,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to(torch.float16).to_empty(device="cpu")
    with torch.no_grad():
        for seed, (name, one) in enumerate(model.named_parameters()):
            if "norm" in name:
                one.fill_(1)
                continue
            values = torch.from_numpy(random_values(tuple(one.shape), seed, _SCALE))
            one.copy_(values.masked_fill_(values.abs() < _LEAST, 0).to(torch.bfloat16))
    model.save_pretrained(folder)
    return sum(one.numel() for one in model.parameters())


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
