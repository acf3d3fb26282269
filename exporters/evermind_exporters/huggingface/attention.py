"""Attention as one node of the exported graph: new keys and values in, no cache.

transformers (5.23) keeps a registry of ways to compute attention. A survey runs the model once
with one registered here that only looks: a layer is plain if attention gets its keys and values
straight from the cache, or as `latent.py` has it, and sees every earlier token, or those in a
window or chunk. If all are plain, the model is traced with another, a node that `states.py` turns
into an operator which keeps the cache itself; no mask is computed then, and nothing is read of the
cache but its length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from evermind_manifests.errors import UnsupportedError

from .latent import Latent, from_latents, latent_of, to_latents

if TYPE_CHECKING:
    import torch

DOMAIN, OPERATOR = "evermind", "Attention"
#: The cache tensor `(1, 1, tokens, 1)` of a layer whose keys and values the node keeps.
LENGTH = "length"
#: GroupQueryAttention takes heads whose width is a multiple of it (ONNX Runtime 1.31).
WIDTH_MULTIPLE = 8
_SURVEY, _CUT = "evermind_survey", "evermind_attention"
# Positions that a mask is looked at for, if the configuration does not say how many there are.
_POSITIONS = 1 << 17


class Sight(NamedTuple):
    """Which tokens one sees: with `window` only the last so many, itself included; else all
    before it. If `chunked`, those of its own chunk of so many tokens."""

    window: int
    chunked: bool


class Plain(NamedTuple):
    """A layer's attention; its node keeps keys and values of `heads` heads of this `width`."""

    sight: Sight
    latent: Latent | None
    heads: int
    width: int


class _Mask(NamedTuple):
    """Stands in for a mask; without `sight` it is of another form."""

    sight: Sight | None


def survey(
    model: Any, sample: Mapping[str, Any], *, chunks: bool = True
) -> dict[int, Plain] | None:
    """Layer → its attention, of a model whose attention is all plain; else None.

    `sample` are the model's inputs without a cache; nothing of their content matters. Without
    `chunks`, attention in chunks is not plain.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

    from .cache_layers import LengthLayer

    cache = DynamicCache(config=model.config)
    layers = _replace(cache, LengthLayer)
    given = LengthLayer.given
    found: dict[int, Plain | None] = {}
    # Of layers that are alike: to find out takes draws as large as their weights.
    latents: dict[Hashable, Latent | None] = {}

    def latent_like(module: Any, new: Any, query: Any, value: Any) -> Latent | None:
        key = type(module), *(one.shape for one in (*new, query, value))
        if key not in latents:
            latents[key] = latent_of(module, new, query, value)
        return latents[key]

    def look(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> tuple[Any, None]:
        layer = getattr(module, "layer_idx", -1)
        sight = mask.sight if isinstance(mask, _Mask) else None
        if sight is not None and sight.chunked and not chunks:
            sight = None
        found[layer] = None
        if layer in given and sight is not None and options.get("is_causal") is not False:
            straight = key is given[layer][0] and value is given[layer][1]
            latent = None if straight else latent_like(module, given[layer], query, value)
            heads_fit = query.shape[1] % key.shape[1] == 0 and query.shape[3] == key.shape[3]
            if heads_fit and latent:
                width = sum(one.shape[3] for one in given[layer])
                found[layer] = Plain(sight, latent, 1, padded_width(width))
            elif heads_fit and straight:
                width = padded_width(query.shape[3], value.shape[3])
                found[layer] = Plain(sight, None, key.shape[1], width)
            # Attention that comes again before the cache is given more is of another kind.
            del given[layer]
        shape = query.shape[0], query.shape[2], query.shape[1], value.shape[3]
        return query.new_zeros(shape), None

    def mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> _Mask:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return _Mask(_sight(mask_function, limit or _POSITIONS))

    AttentionInterface.register(_SURVEY, look)
    AttentionMaskInterface.register(_SURVEY, mask)
    with _attention_by(model, _SURVEY) as settable:
        if not settable:
            return None
        try:
            model(**sample, past_key_values=cache, use_cache=True)
        except UnsupportedError:
            raise
        except Exception:  # code that wants a real mask: then the layer is not plain
            return None
        finally:
            given.clear()
    plain = {layer: one for layer, one in found.items() if one is not None}
    return plain if plain and plain.keys() == found.keys() == layers.keys() else None


@contextmanager
def attention_nodes(model: Any, layers: Mapping[int, Plain]) -> Iterator[None]:
    """Meanwhile every attention of the model is a node of the exported graph."""
    from transformers import AttentionInterface

    from .cache_layers import LengthLayer

    def cut(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **o: Any
    ) -> tuple[torch.Tensor, None]:
        layer = module.layer_idx
        sight, latent = layers[layer][:2]
        o["scaling"] = query.shape[3] ** -0.5 if o.get("scaling") is None else o["scaling"]
        if latent is None:
            return _node(layer, sight, query, key, value, o), None
        import torch

        weight = module.kv_b_proj.weight
        latents = torch.cat(LengthLayer.given[layer], -1)
        query = to_latents(latent, weight, query)
        return from_latents(latent, weight, _node(layer, sight, query, latents, latents, o)), None

    # There is no mask function of this name, so that transformers makes no mask.
    AttentionInterface.register(_CUT, cut)
    with _attention_by(model, _CUT):
        try:
            yield
        finally:
            LengthLayer.given.clear()


def keep_lengths(cache: Any, tokens: int) -> None:
    """Have `cache` hold, for `tokens` earlier ones, no keys and values, but how many there are."""
    from .cache_layers import LengthLayer

    _replace(cache, lambda number: LengthLayer(number, tokens))


def keep_all(cache: Any) -> None:
    """Have an empty `cache` keep what has left a window; the mask still leaves it out."""
    from transformers.cache_utils import DynamicLayer

    _replace(cache, lambda _: DynamicLayer())  # type: ignore[no-untyped-call]


def _node(
    layer: int,
    sight: Sight,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """`(1, T, heads, width of values)` of `(1, heads, T, width)` each."""
    import torch

    heads, kv_heads, tokens = query.shape[1], key.shape[1], query.shape[2]
    values = value.shape[3]
    padded = padded_width(query.shape[3], values)

    def rows(x: torch.Tensor) -> torch.Tensor:
        # Zeros change no product of queries and keys, and add nothing to the values' widths.
        if x.shape[3] != padded:
            x = torch.nn.functional.pad(x, (0, padded - x.shape[3]))
        return x.transpose(1, 2).reshape(1, tokens, x.shape[1] * padded)

    attributes: dict[str, Any] = {
        "layer": layer,
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(options["scaling"]),
        "window": sight.window,
        "chunked": int(sight.chunked),
        "softcap": float(options.get("softcap") or 0.0),
        "width": padded,
    }
    inputs = [rows(query), rows(key), rows(value)]
    if options.get("s_aux") is not None:
        inputs.append(options["s_aux"])
    found: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}",
        inputs,
        attrs=attributes,
        dtype=query.dtype,
        shape=(1, tokens, heads * padded),
        version=1,
    )
    return found.reshape(1, tokens, heads, padded)[..., :values]


def padded_width(*widths: int) -> int:
    """How wide the operator takes a head to be."""
    return -(-max(widths) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _sight(mask_function: Callable[..., Any], limit: int) -> Sight | None:
    """What a mask lets tokens see of `limit`; None if it is otherwise."""
    import torch

    first = torch.zeros((), dtype=torch.int64, device="cpu")
    every = torch.arange(limit, device="cpu")

    def row(position: int) -> torch.Tensor:
        seen = mask_function(first, first, first + position, every)
        return torch.as_tensor(seen, device="cpu").broadcast_to(limit)

    # As many tokens see the first one.
    width = int(torch.as_tensor(mask_function(first, first, every, first)).sum())
    if not width:
        return None
    near = (0, width, 2 * width, limit // 2 // width * width, limit)
    positions = {one + step for one in near for step in (-1, 0, 1)}
    for chunked in (False, True):
        for position in sorted(positions & set(range(limit))):
            begin = position // width * width if chunked else position - width + 1
            if not bool((row(position) == ((every <= position) & (every >= begin))).all()):
                break
        else:
            return Sight(0 if width == limit else width, chunked)
    return None


def _replace(cache: Any, make: Callable[[int], Any]) -> dict[int, Any]:
    """The layers put in the place of those that hold keys and values alone, by number."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    new = {}
    for number, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[number] = new[number] = make(number)
    return new


@contextmanager
def _attention_by(model: Any, implementation: str) -> Iterator[bool]:
    """Whether the model lets its attention be replaced, as it now is."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield model.config._attn_implementation == implementation
    finally:
        model.set_attn_implementation(before)
