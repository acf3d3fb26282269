"""One shared-expert MoE layer: router, top-k, grouped dispatch.

    y = Shared(x) + sum over the k routed experts of gate * Expert(x)
    Expert(x) = b2 + w2·relu(b1 + w1·x)

Source: specs/evermind-formats.md, section 4.3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from evermind_exporters.checkpoints import ffn_shapes
from torch import Tensor, nn
from torch.nn.functional import linear, relu


class Routes(NamedTuple):
    """Where tokens went; leading dimensions are the tokens'.

    `experts` (…, k) int64, best first; `gates` (…, k), softmax over the chosen experts;
    `probs` (…, E), softmax over all; `logits` (…, E).
    """

    experts: Tensor
    gates: Tensor
    probs: Tensor
    logits: Tensor

    def unflatten(self, *shape: int) -> Routes:
        """The same routes with the first dimension split into `shape`."""
        return Routes(*(value.reshape(*shape, *value.shape[1:]) for value in self))


class MoeOutput(NamedTuple):
    """`y` (N, D) and the routes of its N tokens, as in `Routes`."""

    y: Tensor
    experts: Tensor
    gates: Tensor
    probs: Tensor
    logits: Tensor


class MoeLayer(nn.Module):
    """The layer itself, weights uninitialised: `SharedExpertMoE` and `EvermindLM` fill them."""

    def __init__(self, width: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router = Router(width, experts, top_k)
        self.shared = Ffn(width, hidden)
        self.experts = Experts(width, hidden, experts)

    def forward(self, x: Tensor) -> MoeOutput:
        """`x` (N, D) → `MoeOutput`."""
        return apply_moe(self.router, self.shared, self.experts, x)


def apply_moe(router: Router, shared: Ffn, experts: Experts, x: Tensor) -> MoeOutput:
    """`x` (N, D) → the shared expert's output plus the gated sum of the routed ones'."""
    routes: Routes = router(x)
    return MoeOutput(shared(x) + experts(x, routes.experts, routes.gates), *routes)


class Router(nn.Module):
    """Scores experts; takes the top k, ties to the lower index."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Tensor) -> Routes:
        """`x` (N, D) → routes of the N tokens."""
        exact = x.double() @ self.weight.double().T
        # Ties are judged on float32 logits, as the peer stores them; torch.topk promises
        # nothing about equal values, a stable sort does.
        ranked = torch.sort(exact.detach().float(), dim=-1, descending=True, stable=True)
        experts = ranked.indices[:, : self.top_k]
        logits = exact.to(x.dtype)
        gates = torch.softmax(logits.gather(-1, experts), dim=-1)
        return Routes(experts, gates, torch.softmax(logits, dim=-1), logits)

    def route_margin(self, routes: Routes) -> float:
        """The smallest gap between logits that decided which experts, and their order."""
        return smallest_gap(routes.logits, self.top_k)


def smallest_gap(scores: Tensor, top_k: int) -> float:
    """The least difference between neighbours of the best `top_k` + 1 `scores` (N, E) of a row."""
    ranked = torch.sort(scores, dim=-1, descending=True).values[:, : top_k + 1]
    gaps = ranked[:, :-1] - ranked[:, 1:]
    return float(gaps.min()) if gaps.numel() else math.inf


class Ffn(nn.Module):
    """One expert that every token uses."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        for name, shape in ffn_shapes(width, hidden).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (N, D) → (N, D)."""
        return _ffn(x, *self.parameters())


class Experts(nn.Module):
    """E experts, stacked `[E, …]` in memory; a state dict has them one by one (`3.w1`)."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.count = experts
        for name, shape in ffn_shapes(width, hidden).items():
            self.register_parameter(name, nn.Parameter(torch.empty(experts, *shape)))

    def forward(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """`x` (N, D), `experts` (N, k) int64, `gates` (N, k) → (N, D): gated sum of outputs.

        Tokens are grouped by expert and each expert runs once. At N=2048, D=128, H=256,
        E=16, k=2 on 2 cores this took 31 ms forward and backward, as a padded batched
        product did with balanced experts; unbalanced ones cost the latter its padding.
        """
        tokens, k = experts.shape
        flat = experts.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.count).tolist()
        groups = torch.split(x.index_select(0, order // k), counts)
        # unbind, not indexing: its backward writes each stacked gradient once.
        weights = zip(*(stacked.unbind(0) for stacked in self.parameters()), strict=True)
        outputs = [_ffn(group, *expert) for group, expert in zip(groups, weights, strict=True)]
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        chosen = torch.cat(outputs).index_select(0, position).view(tokens, k, x.shape[1])
        return (chosen * gates.unsqueeze(-1)).sum(dim=1)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for index in range(self.count):
            for name, stacked in self.named_parameters(recurse=False):
                expert = stacked[index]
                destination[f"{prefix}{index}.{name}"] = expert if keep_vars else expert.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = set()
        for name, stacked in self.named_parameters(recurse=False):
            for index in range(self.count):
                key = f"{prefix}{index}.{name}"
                expected.add(key)
                value = state_dict.get(key)
                if value is None:
                    missing_keys.append(key)
                elif value.shape != stacked.shape[1:]:
                    error_msgs.append(
                        f"{key}: expected shape {tuple(stacked.shape[1:])}, "
                        f"found {tuple(value.shape)}"
                    )
                else:
                    with torch.no_grad():
                        stacked[index].copy_(value)
        unexpected_keys.extend(
            key for key in state_dict if key.startswith(prefix) and key not in expected
        )


def _ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return linear(relu(linear(x, w1, b1)), w2, b2)
