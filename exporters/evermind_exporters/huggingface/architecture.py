"""How many parameters each part of a Mixture-of-Experts transformer has, from its config.

Sizes come from fields that nearly all architectures name alike; what a config does not say
(which biases and norms there are) stands in a table of the architectures it was checked for,
parameter by parameter, against transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from evermind_manifests.errors import ConfigError

from .attention import padded_width
from .fields import Fields

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# Layers that keep a recurrent state instead of keys and values.
_RECURRENT = ("mamba_d_state", "mamba_d_conv", "attn_layer_period", "full_attention_interval")
MOST_LAYERS = 10_000
_EXPERT_COUNTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)


@dataclass(frozen=True, slots=True)
class Traits:
    """What an architecture's config leaves unsaid.

    `qkv_bias`, `o_bias`: the field that turns them on (empty: never). `bias_default`: what
    holds where it is absent. `layer_norm`: norms have a bias too.
    """

    qkv_bias: str = "attention_bias"
    o_bias: str = "attention_bias"
    bias_default: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    qk_norm_field: str = ""
    layer_norm: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    #: Added to the scores to balance the load: one number per expert.
    score_correction: bool = False
    sinks: bool = False
    shared_gate: bool = False
    tied: bool = False
    head_dim: int | None = None
    alternating: bool = False


ARCHITECTURES: Final[dict[str, Traits]] = {
    "mixtral": Traits(qkv_bias="", o_bias=""),
    "olmoe": Traits(qk_norm="projection"),
    "flex_olmo": Traits(qk_norm="projection"),
    "qwen2_moe": Traits(qkv_bias="qkv_bias", o_bias="", bias_default=True, shared_gate=True),
    "qwen3_moe": Traits(qk_norm="head"),
    "deepseek_v2": Traits(),
    "deepseek_v3": Traits(score_correction=True),
    "phimoe": Traits(layer_norm=True),
    "granitemoe": Traits(),
    "granitemoeshared": Traits(),
    "gpt_oss": Traits(
        bias_default=True,
        router_bias=True,
        expert_bias=True,
        sinks=True,
        head_dim=64,
        alternating=True,
    ),
    "glm4_moe": Traits(
        o_bias="", qk_norm="head", qk_norm_field="use_qk_norm", score_correction=True
    ),
    "dots1": Traits(qk_norm="head", score_correction=True),
    "ernie4_5_moe": Traits(
        qkv_bias="use_bias", o_bias="use_bias", score_correction=True, tied=True
    ),
    "hunyuan_v1_moe": Traits(qk_norm="head"),
    "minimax_m2": Traits(
        qkv_bias="", o_bias="", qk_norm="projection", score_correction=True, head_dim=128
    ),
}


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """One layer's parameters, and the numbers it keeps of a token for later ones.

    `experts` is 0 for a dense layer; `expert` is what each routed expert has, in tensors of
    `expert_tensors` elements. `window` bounds how many tokens are kept (0: all).
    """

    trunk: int
    experts: int = 0
    top_k: int = 0
    expert_tensors: tuple[int, ...] = ()
    kept_per_token: int = 0
    window: int = 0

    @property
    def expert(self) -> int:
        """Parameters of one routed expert."""
        return sum(self.expert_tensors)


@dataclass(frozen=True, slots=True)
class Counts:
    """A whole model's parameters; `head` is 0 where the embedding serves as the head."""

    layers: tuple[LayerCounts, ...]
    embedding: int
    head: int
    norm: int
    tied: bool
    known: bool

    @property
    def experts(self) -> int:
        """All routed experts'."""
        return sum(layer.experts * layer.expert for layer in self.layers)

    @property
    def trunk(self) -> int:
        """Everything else."""
        return sum(layer.trunk for layer in self.layers) + self.embedding + self.head + self.norm

    @property
    def active(self) -> int:
        """What one token reads: of the embedding only its row, unless it is the head too."""
        routed = sum(layer.top_k * layer.expert for layer in self.layers)
        return routed + self.trunk - (0 if self.tied else self.embedding)


def count_parameters(fields: Fields) -> Counts:
    """Count. Raises `ConfigError` for a model without routed experts, or one whose layers
    keep a recurrent state, which this cannot count.
    """
    kind = fields.text("model_type")
    traits = ARCHITECTURES.get(kind, Traits())
    if not fields.has(*_EXPERT_COUNTS):
        raise ConfigError(
            f"{fields.where}: expected a Mixture of Experts, with one of the fields "
            f"{', '.join(_EXPERT_COUNTS)}; found none (model_type {kind or 'not given'})"
        )
    layers = fields.count("num_hidden_layers", "n_layers", least=1, most=MOST_LAYERS)
    _refuse_recurrent_layers(fields, kind, layers)
    hidden = fields.count("hidden_size", "d_model", least=1)
    vocabulary = fields.count("vocab_size", least=1)
    tied = fields.flag("tie_word_embeddings", default=traits.tied)
    norm = hidden * (2 if traits.layer_norm else 1)
    head_bias = vocabulary if fields.flag("lm_head_bias", default=False) else 0
    if kind == "ernie4_5_moe" and fields.flag("use_bias", default=False):
        head_bias = vocabulary
    attention = _attention(fields, traits, hidden)
    windows = _windows(fields, traits, layers)
    sparse = _sparse_layers(fields, layers)
    if not any(sparse):
        raise ConfigError(f"{fields.where}: expected a Mixture of Experts, found only dense layers")
    experts = _experts(fields, traits, hidden)
    dense = _dense(fields, hidden)
    kept = _kept_per_token(fields, traits, hidden)
    counted = []
    for is_sparse, window in zip(sparse, windows, strict=True):
        trunk = attention + 2 * norm
        if is_sparse:
            counted.append(
                LayerCounts(
                    trunk=trunk + experts.trunk,
                    experts=experts.experts,
                    top_k=experts.top_k,
                    expert_tensors=experts.expert_tensors,
                    kept_per_token=kept,
                    window=window,
                )
            )
        else:
            counted.append(LayerCounts(trunk=trunk + dense, kept_per_token=kept, window=window))
    return Counts(
        layers=tuple(counted),
        embedding=vocabulary * hidden,
        head=head_bias + (0 if tied else vocabulary * hidden),
        norm=norm,
        tied=tied,
        known=kind in ARCHITECTURES,
    )


def _refuse_recurrent_layers(fields: Fields, kind: str, layers: int) -> None:
    odd = sorted(set(fields.texts("layer_types", layers) or ()) - _ATTENTION)
    odd = odd or [name for name in _RECURRENT if fields.has(name)]
    if odd:
        raise ConfigError(
            f"{fields.where}: {kind}: layers with a recurrent state ({', '.join(odd)[:120]}) "
            "cannot be counted from the config's fields alone",
            hint="With transformers they can: pip install 'evermind-pack[hf]'.",
        )


def _attention(fields: Fields, traits: Traits, hidden: int) -> int:
    heads, kv_heads, head_dim = _heads(fields, traits, hidden)
    qkv_bias = bool(traits.qkv_bias) and fields.flag(traits.qkv_bias, default=traits.bias_default)
    o_bias = bool(traits.o_bias) and fields.flag(traits.o_bias, default=traits.bias_default)
    if fields.has("kv_lora_rank"):
        return _latent_attention(fields, hidden, heads, bias=qkv_bias)
    queries, keys = heads * head_dim, kv_heads * head_dim
    count = hidden * (queries + 2 * keys) + queries * hidden
    count += (queries + 2 * keys) * qkv_bias + hidden * o_bias
    if not traits.qk_norm_field or fields.flag(traits.qk_norm_field, default=False):
        count += {"none": 0, "head": 2 * head_dim, "projection": queries + keys}[traits.qk_norm]
    return count + heads * traits.sinks


def _latent_attention(fields: Fields, hidden: int, heads: int, *, bias: bool) -> int:
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""
    rank = fields.count("kv_lora_rank", least=1)
    rope = fields.count("qk_rope_head_dim", default=64)
    nope = fields.count("qk_nope_head_dim", default=128)
    value = fields.count("v_head_dim", default=128)
    if fields.has("q_lora_rank"):
        q_rank = fields.count("q_lora_rank", least=1)
        queries = hidden * q_rank + q_rank + q_rank * heads * (nope + rope) + q_rank * bias
    else:
        queries = hidden * heads * (nope + rope)
    latent = hidden * (rank + rope) + (rank + rope) * bias + rank
    expand = rank * heads * (nope + value)
    return queries + latent + expand + heads * value * hidden + hidden * bias


def _heads(fields: Fields, traits: Traits, hidden: int) -> tuple[int, int, int]:
    heads = fields.count("num_attention_heads", least=1)
    kv_heads = fields.count("num_key_value_heads", default=heads, least=1)
    head_dim = fields.count("head_dim", default=traits.head_dim or hidden // heads, least=1)
    return heads, kv_heads, head_dim


def _experts(fields: Fields, traits: Traits, hidden: int) -> LayerCounts:
    """A sparse layer's experts; its `trunk` is the router and what every token passes through."""
    experts = fields.count(*_EXPERT_COUNTS, least=1)
    top_k = fields.count("num_experts_per_tok", "moe_k", "moe_topk", least=1)
    if top_k > experts:
        raise ConfigError(
            f"{fields.where}: num_experts_per_tok: expected at most the {experts} experts, "
            f"found {top_k}"
        )
    inner = fields.count("moe_intermediate_size", "intermediate_size", least=1)
    tensors = [hidden * inner] * 3
    if traits.expert_bias:
        tensors += [2 * inner, hidden]
    router = experts * hidden + experts * (traits.router_bias + traits.score_correction)
    shared = 3 * hidden * _shared_width(fields, inner) + hidden * traits.shared_gate
    return LayerCounts(
        trunk=router + shared, experts=experts, top_k=top_k, expert_tensors=tuple(tensors)
    )


def _shared_width(fields: Fields, inner: int) -> int:
    """How wide the experts are, together, that every token passes through."""
    kind = fields.text("model_type")
    if kind == "hunyuan_v1_moe":
        return fields.count("intermediate_size", least=1)
    width = fields.count("shared_expert_intermediate_size", "shared_intermediate_size", default=0)
    if width:
        return width
    return inner * fields.count("n_shared_experts", "moe_num_shared_experts", default=0)


def _dense(fields: Fields, hidden: int) -> int:
    return 3 * hidden * fields.count("intermediate_size", "ffn_dim", least=1)


def _sparse_layers(fields: Fields, layers: int) -> list[bool]:
    """Which layers have experts."""
    named = fields.texts("mlp_layer_types", layers)
    if named is not None:
        return [name == "sparse" for name in named]
    dense_first = fields.count("first_k_dense_replace", "moe_layer_start_index", default=0)
    every = fields.count("decoder_sparse_step", "moe_layer_interval", default=1, least=1)
    last = layers - 1
    if fields.values.get("moe_layer_end_index") not in (None, -1):
        last = fields.count("moe_layer_end_index")
    dense = set(fields.counts("mlp_only_layers"))
    return [
        dense_first <= at <= last and at not in dense and (at + 1) % every == 0
        for at in range(layers)
    ]


def _kept_per_token(fields: Fields, traits: Traits, hidden: int) -> int:
    """Keys and values, as `attention.py` keeps them; latents stand for both."""
    if fields.has("kv_lora_rank"):
        heads = 1
        width = fields.count("kv_lora_rank") + fields.count("qk_rope_head_dim", default=64)
    else:
        _, heads, width = _heads(fields, traits, hidden)
    return 2 * heads * padded_width(width)


def _windows(fields: Fields, traits: Traits, layers: int) -> list[int]:
    """For each layer the tokens its attention looks back at most; 0 where there is no bound."""
    window = fields.count("sliding_window", default=0)
    if not window or not fields.flag("use_sliding_window", default=True):
        return [0] * layers
    kinds = fields.texts("layer_types", layers)
    if kinds is not None:
        return [0 if kind == "full_attention" else window for kind in kinds]
    if traits.alternating:
        return [window if at % 2 == 0 else 0 for at in range(layers)]
    first = fields.count("max_window_layers", default=0)
    return [window if at >= first else 0 for at in range(layers)]
