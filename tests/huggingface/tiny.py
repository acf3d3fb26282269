"""Tiny random checkpoints, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: model_type (and what is special, after a comma) → what makes it tiny.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    # Experts with biases, transposed, gate and up interleaved, clamped; attention with sinks, in
    # a window in every other layer.
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    # States of fixed shape beside caches that grow, and a recurrence.
    "jamba": {
        "intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
}

_DEEPSEEK = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_SHARED = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 8,
}
_DELTA = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_KIMI = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
_MIXTRAL = ARCHITECTURES["mixtral"]
#: As above; these take minutes together and are not part of an ordinary run.
CARRIED: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
    },
    "mixtral, window": {**_MIXTRAL, "sliding_window": 8},
    "flex_olmo": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _SHARED,
    "dots1": _SHARED,
    "granitemoe": _MIXTRAL,
    "granitemoeshared": {**_MIXTRAL, "shared_intermediate_size": 40},
    "phimoe": _MIXTRAL,
    "phimoe, longrope": {
        **_MIXTRAL,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 2.1, 2.2, 2.3],
            "short_mscale": 1.1,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 600,
        },
    },
    "minimax_m2": {**_MIXTRAL, "head_dim": 8, "rotary_dim": 8},
    "ernie4_5_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "hunyuan_v1_moe": {
        "intermediate_size": 24,
        "num_experts": 8,
        "moe_topk": 2,
        "head_dim": 8,
    },
    "lfm2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "qwen3_next": {**_DELTA, "intermediate_size": 48, "num_experts_per_tok": 3},
    "qwen3_5_moe_text": _DELTA,
    "granitemoehybrid": {
        **_MIXTRAL,
        "shared_intermediate_size": 40,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_d_head": 16,
        "mamba_chunk_size": 16,
    },
    "nemotron_h": {
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "n_routed_experts": 8,
    },
    "kimi_linear": {**_KIMI, "linear_head_dim": 16, "linear_num_heads": 2},
    "bailing_hybrid": {**_KIMI, "head_dim": 16, "n_group": 2, "topk_group": 1},
    "zaya": {
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "router_hidden_size": 16,
    },
}
CARRIED |= {
    # Experts that transformers does not mark.
    "llama4_text": {
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 3,
        "interleave_moe_layer_step": 1,
        "moe_layers": [0, 2],
        "head_dim": 8,
        # Attention in chunks of tokens, but for the last layer.
        "no_rope_layers": [1, 1, 0],
        "attention_chunk_size": 8,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 1024,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
}


def make(
    folder: Path,
    model_type: str,
    dtype: str = "float32",
    max_shard_size: str = "10GB",
    fused: bool = False,
    form: dict[str, Any] | None = None,
) -> Any:
    """Save a checkpoint of random weights; gives it as transformers loads it, in float32.

    `fused` stores all experts of a layer as one tensor, as the model has them in memory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        model_type.partition(",")[0],
        **{**COMMON, **(form or (ARCHITECTURES | CARRIED)[model_type])},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif name.endswith("A_log"):  # slow decays, so that states outlive a few tokens
                parameter.normal_(mean=-2.0, std=0.1)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(mean=1.0, std=0.1)
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in stored and name.endswith("bias"):  # in the choice of experts
                buffer.normal_(std=0.1)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not fused)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
