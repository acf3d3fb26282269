"""Latent attention (DeepSeek-V2, section 2.1) over the latents themselves.

transformers (5.23) caches latents, one head for all, and at every step makes keys and values of
them all: `expand_kv` of its attention, whose only weights are `kv_b_proj`. The same products in
another order need no keys and values: a query times a key is the query times the key's weights,
times the latent; and so with values. Attention then has one key head as wide as a latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# Of float32 sums in another order.
_TOLERANCE = 1e-4


class Latent(NamedTuple):
    """Widths of a head's key without and with what is rotated, of its value, and of a latent."""

    plain: int
    key: int
    value: int
    rank: int


def latent_of(
    module: Any, given: tuple[torch.Tensor, torch.Tensor], query: torch.Tensor, value: torch.Tensor
) -> Latent | None:
    """The widths, if `module` makes keys and values as above of what it gave the cache.

    `given` are latents `(1, 1, T, rank)` and the keys' rotated part `(1, 1, T, …)`, `query` and
    `value` `(1, heads, T, …)`. Weights are drawn to find out: the module's own need not be there.
    """
    import torch

    weights = getattr(module, "kv_b_proj", None)
    latents, rotated = given
    if not hasattr(module, "expand_kv") or not isinstance(weights, torch.nn.Linear):
        return None
    heads, rank, width = query.shape[1], latents.shape[3], rotated.shape[3]
    found = Latent(query.shape[3] - width, query.shape[3], value.shape[3], rank)
    shape = heads * (found.plain + found.value), rank
    if weights.bias is not None or tuple(weights.weight.shape) != shape:
        return None
    if latents.shape[1] != 1 or rotated.shape[1] != 1 or found.plain <= 0:
        return None
    random = torch.Generator(device="cpu").manual_seed(0)
    drawn = _Drawn(module, torch.randn(shape, generator=random) * rank**-0.5)
    rows = [torch.randn(1, 1, 3, one, generator=random) for one in (rank, width)]
    keys, values = type(module).expand_kv(drawn, *rows)
    halves = torch.split(drawn.weight.view(heads, -1, rank), [found.plain, found.value], 1)
    plain, expected = (rows[0] @ one.transpose(1, 2) for one in halves)
    pairs = (keys, torch.cat([plain, rows[1].expand(-1, heads, -1, -1)], -1)), (values, expected)
    fits = all(torch.allclose(a, b, atol=_TOLERANCE) for a, b in pairs)
    return found if fits else None


def to_latents(latent: Latent, weight: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Queries `(1, heads, T, key)` for latents with the rotated part behind them."""
    import torch

    plain, rotated = torch.split(query, [latent.plain, latent.key - latent.plain], -1)
    # The values' weights count for nothing here, and to leave them out would copy all the others.
    padded = torch.nn.functional.pad(plain, (0, latent.value))
    return torch.cat([padded @ _by_head(latent, weight), rotated], -1)


def from_latents(latent: Latent, weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Sums of values `(1, T, heads, value)` of sums of latents `(1, T, heads, rank or more)`."""
    latents = found[..., : latent.rank].permute(0, 2, 3, 1)
    both = _by_head(latent, weight) @ latents
    return both[:, :, latent.plain :].permute(0, 3, 1, 2)


def _by_head(latent: Latent, weight: torch.Tensor) -> torch.Tensor:
    return weight.view(-1, latent.plain + latent.value, latent.rank)


class _Drawn:
    """An attention module with other weights."""

    def __init__(self, module: Any, weight: torch.Tensor) -> None:
        self._module = module
        self.weight = weight

    def kv_b_proj(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
