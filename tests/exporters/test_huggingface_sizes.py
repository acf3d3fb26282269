"""Counts from a config alone, against transformers' own models and published totals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evermind_exporters.huggingface import config_sizes, read_config
from evermind_exporters.huggingface.architecture import ARCHITECTURES
from evermind_manifests.errors import ConfigError, LocationError

COUNTS = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "huggingface" / "counts.json").read_text()
)
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN15 = {
    "model_type": "qwen2_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "use_sliding_window": False,
    "sliding_window": 32768,
}
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "quantization_config": {"quant_method": "mxfp4"},
}
PHI35_MOE = {
    "model_type": "phimoe",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
}
# What their authors say, in thousands of millions: all parameters.
PUBLISHED = [
    (MIXTRAL, 46.7),
    (OLMOE, 6.92),
    (QWEN3_30B, 30.5),
    (QWEN15, 14.3),
    (DEEPSEEK_V2_LITE, 15.7),
    (DEEPSEEK_V3, 671),
    (GPT_OSS_20B, 20.9),
    (PHI35_MOE, 41.9),
]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_transformers(name: str) -> None:
    case = COUNTS[name]
    counted = config_sizes({"dtype": "float32", **case["config"]})
    assert counted.model_type in ARCHITECTURES
    assert counted.notes == ()
    assert counted.sizes.total_parameters == case["parameters"]
    assert counted.sizes.expert_parameters == case["expert_parameters"]


def test_every_architecture_in_the_table_is_checked() -> None:
    assert {case["config"]["model_type"] for case in COUNTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(("config", "billions"), PUBLISHED, ids=lambda case: str(case)[16:27])
def test_totals_are_those_published(config: dict[str, Any], billions: float) -> None:
    total = config_sizes(config).sizes.total_parameters / 1e9
    assert f"{total:.3g}" == f"{billions:.3g}"


def test_sizes_of_mixtral() -> None:
    counted = config_sizes(MIXTRAL, dtype="f16", context=4096)
    sizes = counted.sizes
    page = 4096  # a shard's header
    assert {layer.bytes for layer in sizes.layers} == {3 * 4096 * 14336 * 2 + page}
    assert len(sizes.layers) == 32
    assert sizes.least_budget == 2 * (3 * 4096 * 14336 * 2 + page)
    assert sizes.cycle_bytes == 32 * sizes.least_budget
    # Keys and values of 8 heads of 128 in 32 layers, float32.
    assert sizes.state_bytes == 2 * 8 * 128 * 32 * 4096 * 4
    assert sizes.resident_bytes == (sizes.total_parameters - sizes.expert_parameters) * 2
    # The embedding is read by the row, the head whole.
    assert sizes.resident_bytes - sizes.active_resident_bytes == 32000 * 4096 * 2
    assert counted.checkpoint_bytes == sizes.total_parameters * 2
    # The experts of each layer, a segment before, between and after them.
    assert sizes.graph_runs == 65


def test_weights_are_counted_as_an_import_stores_them() -> None:
    kept, wide = config_sizes(MIXTRAL).sizes, config_sizes(MIXTRAL, trunk="f32").sizes
    assert kept == config_sizes(MIXTRAL, dtype="bf16").sizes
    assert wide.resident_bytes == 2 * kept.resident_bytes
    assert wide.layers == kept.layers
    all_wide = config_sizes(MIXTRAL, dtype="f32").sizes
    assert all_wide.resident_bytes == wide.resident_bytes
    assert all_wide.all_expert_bytes == pytest.approx(2 * kept.all_expert_bytes, rel=1e-4)
    with pytest.raises(ConfigError, match=r"trunk: expected one of keep, f16, bf16, f32, found"):
        config_sizes(MIXTRAL, trunk="f8")  # type: ignore[arg-type]
    silent = config_sizes({**MIXTRAL, "torch_dtype": None})
    assert silent.sizes == all_wide
    assert "does not say" in silent.notes[0]


def test_a_latent_cache_and_a_window_keep_less() -> None:
    lite = config_sizes(DEEPSEEK_V2_LITE, context=1000).sizes
    # Held as keys and as values.
    assert lite.state_bytes == 27 * 2 * (512 + 64) * 1000 * 4
    oss = config_sizes({**GPT_OSS_20B, "max_position_embeddings": 131072}, context=1000).sizes
    assert oss.state_bytes == 2 * 8 * 64 * 4 * (12 * (127 + 64) + 12 * 1000)
    qwen = config_sizes({**QWEN15, "use_sliding_window": False}, context=1000).sizes
    assert qwen.state_bytes == 2 * 16 * 128 * 4 * 24 * 1000


def test_quantised_checkpoints_weigh_what_is_published() -> None:
    v3, oss = config_sizes(DEEPSEEK_V3), config_sizes(GPT_OSS_20B)
    assert v3.checkpoint_bytes == pytest.approx(672e9, rel=0.01)
    assert oss.checkpoint_bytes == pytest.approx(13.76e9, rel=0.01)
    # Powers of two times 2 bits fit bfloat16, other factors times 4 do not.
    assert oss.sizes.layers[0].bytes == pytest.approx(2 * 3 * 2880**2, rel=0.01)
    assert v3.sizes.layers[0].bytes == pytest.approx(4 * 3 * 7168 * 2048, rel=0.01)
    assert any("float32 factors" in note for note in v3.notes)
    assert not any("float32 factors" in one for one in config_sizes(DEEPSEEK_V3, dtype="f16").notes)
    short = {"quant_method": "fp8", "scale_fmt": "ue8m0"}
    halved = config_sizes({**DEEPSEEK_V3, "quantization_config": short}).sizes
    assert halved.resident_bytes < 0.6 * v3.sizes.resident_bytes
    unknown = config_sizes({**GPT_OSS_20B, "quantization_config": {"quant_method": "new"}})
    assert unknown.checkpoint_bytes is None
    assert any("reads no checkpoints quantised as 'new'" in note for note in unknown.notes)


def test_layers_with_and_without_experts() -> None:
    def sparse(**fields: Any) -> list[int]:
        layers = config_sizes({**QWEN3_30B, "num_hidden_layers": 6, **fields}).sizes.layers
        return [layer.layer for layer in layers]

    assert sparse() == [0, 1, 2, 3, 4, 5]
    assert sparse(decoder_sparse_step=2) == [1, 3, 5]
    assert sparse(mlp_only_layers=[0, 3]) == [1, 2, 4, 5]
    assert sparse(first_k_dense_replace=4) == [4, 5]
    assert sparse(moe_layer_start_index=1, moe_layer_end_index=3) == [1, 2, 3]
    assert sparse(mlp_layer_types=["dense"] * 5 + ["sparse"]) == [5]


def test_another_architecture_is_counted_by_its_fields_and_says_so() -> None:
    counted = config_sizes({**QWEN3_30B, "model_type": "new_moe"})
    assert counted.sizes.total_parameters == pytest.approx(30.5e9, rel=0.01)
    assert "not among those checked" in counted.notes[0]
    nested = config_sizes({"model_type": "seeing", "text_config": QWEN3_30B})
    assert nested.sizes == config_sizes(QWEN3_30B).sizes
    assert "only the text model" in nested.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "expected a Mixture of Experts"),
        ({"num_experts": 4}, "expected at most the 4 experts, found 8"),
        ({"hidden_size": "large"}, "hidden_size: expected a whole number"),
        ({"hidden_size": True}, "hidden_size: expected a whole number"),
        ({"hidden_size": -1}, "hidden_size: expected a whole number"),
        ({"hidden_size": 2**40}, "hidden_size: expected a whole number"),
        (
            {"num_hidden_layers": 10**6},
            "num_hidden_layers: expected a whole number from 1 to 10000",
        ),
        ({"layer_types": 4}, "layer_types: expected 48 names"),
        ({"vocab_size": None}, "expected the field vocab_size"),
        ({"mlp_only_layers": list(range(48))}, "found only dense layers"),
        ({"mlp_only_layers": "none"}, "mlp_only_layers: expected a list"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
        ({"layer_types": ["linear_attention"] * 48}, "recurrent state (linear_attention)"),
        ({"mamba_d_state": 16}, "recurrent state (mamba_d_state)"),
        ({"mlp_layer_types": ["sparse"]}, "expected 48 names"),
        ({"quantization_config": 4}, "quantization_config: expected an object"),
        ({"max_position_embeddings": 100}, "at most 100 tokens, found a context of 4,096"),
        (
            {"max_position_embeddings": None, "model_max_length": 100},
            "at most 100 tokens, found a context of 4,096",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_sizes({**QWEN3_30B, **change}, "here/config.json", context=4096)
    assert message in str(caught.value)
    assert "here/config.json" in str(caught.value)


@pytest.mark.parametrize("data", [b"[]", b"{", b'{"a":1,"a":2}', b"\xff", b"[" * 10**5])
def test_what_is_no_config_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(LocationError):
        read_config(path)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(path)
