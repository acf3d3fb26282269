"""What the survey of a model's attention finds, and latent attention in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .tiny import ARCHITECTURES, CARRIED, COMMON

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SAMPLE = {"input_ids": torch.arange(3)[None], "position_ids": torch.arange(5, 8)[None]}
SIZES = ARCHITECTURES | CARRIED


def model_of(model_type: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {**COMMON, **SIZES[model_type], **options}
    config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def found(model: Any, **options: Any) -> Any:
    from evermind_exporters.huggingface.attention import survey

    before = model.config._attn_implementation
    with torch.no_grad():
        result = survey(model, SAMPLE, **options)
    assert model.config._attn_implementation == before
    return result


@pytest.mark.parametrize(
    ("kind", "options", "windows"),
    [
        ("olmoe", {}, [0, 0]),
        ("mixtral", {"sliding_window": 8}, [8, 8]),
        ("mixtral", {"sliding_window": 1}, [1, 1]),
        # As wide as the longest context: no window.
        ("mixtral", {"sliding_window": 1024}, [0, 0]),
        ("gpt_oss", {}, [8, 0]),
        ("deepseek_v3", {}, [0, 0, 0]),
        # The layers without attention do not count.
        ("jamba", {}, [0]),
    ],
)
def test_windows_are_found(kind: str, options: dict[str, Any], windows: list[int]) -> None:
    layers = found(model_of(kind, **options))
    assert [layers[number].sight for number in sorted(layers)] == [(one, False) for one in windows]
    latent = kind == "deepseek_v3"
    assert all((one.latent is not None) == latent for one in layers.values())


def test_chunks_are_found() -> None:
    chunked = {"layer_types": ["chunked_attention", "full_attention", "full_attention"]}
    layers = found(model_of("llama4_text", **chunked, attention_chunk_size=16))
    assert [layers[number].sight for number in range(3)] == [(16, True), (0, False), (0, False)]
    # Not for CUDA, which cannot take out what is of another chunk.
    assert found(model_of("llama4_text", **chunked, attention_chunk_size=16), chunks=False) is None


@pytest.mark.parametrize(
    ("rule", "sight"),
    [
        (lambda q, k: k <= q, (0, False)),
        (lambda q, k: (k <= q) & (k > q - 7), (7, False)),
        (lambda q, k: (k <= q) & (q // 16 == k // 16), (16, True)),
        (lambda q, k: (k <= q) & (q // 60 == k // 60), (60, True)),
        (lambda q, k: (k <= q) & (q // 100 == k // 100), (0, False)),
        (lambda q, k: k == q, (1, False)),
        (lambda q, k: k <= q + 1, None),
        (lambda q, k: (k <= q) & ((q + 8) // 16 == (k + 8) // 16), None),
        (lambda q, k: (k <= q) & (q // 16 == k // 16) & ((q < 90) | (k % 2 == 0)), None),
        (lambda q, k: (k <= q) & (k != 1), None),
        (lambda q, k: (k <= q) & ((k > q - 7) | (k == 0)), None),
        (lambda q, k: k < q, None),
    ],
)
def test_a_mask_is_a_window_or_a_chunk_or_neither(
    rule: Callable[..., Any], sight: tuple[int, bool] | None
) -> None:
    from evermind_exporters.huggingface.attention import _sight

    assert _sight(lambda batch, head, q, k: rule(q, k), 100) == sight


def test_latents_give_what_keys_and_values_give() -> None:
    from evermind_exporters.huggingface.latent import from_latents, latent_of, to_latents

    module = model_of("deepseek_v2").model.layers[1].self_attn
    heads, tokens = 4, 9
    latents, rotated = torch.randn(1, 1, tokens, 16), torch.randn(1, 1, tokens, 8)
    query = torch.randn(1, heads, tokens, 16)
    with torch.no_grad():
        keys, values = module.expand_kv(latents, rotated)
        latent = latent_of(module, (latents, rotated), query, values)
        assert latent == (8, 16, 8, 16)
        weight = module.kv_b_proj.weight
        scores = query @ keys.transpose(2, 3)
        both = torch.cat([latents, rotated], -1)
        ours = to_latents(latent, weight, query) @ both.transpose(2, 3)
        torch.testing.assert_close(ours, scores)
        weighed = (scores.softmax(-1) @ both).transpose(1, 2)
        expected = (scores.softmax(-1) @ values).transpose(1, 2)
        torch.testing.assert_close(from_latents(latent, weight, weighed), expected)


def test_keys_made_otherwise_are_not_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v2")
    attention = type(model.model.layers[1].self_attn)
    original = attention.expand_kv

    def other(self: Any, latents: Any, rotated: Any) -> Any:
        keys, values = original(self, latents, rotated)
        return keys, values.relu()

    monkeypatch.setattr(attention, "expand_kv", other)
    assert found(model) is None
