"""Recurrent layers in a trace: what they keep, and their recurrences as one scan over tokens.

transformers computes a recurrence over many tokens in blocks whose number a trace would fix, and
Mamba's from an empty state only. Both are replaced, while a model is traced, by the recurrence's
definition: one step per token on the state so far, which becomes one ONNX `Scan`. The functions
replaced are those transformers itself lets a faster kernel stand in for, found by their names in
the modules of the model's classes; what it computes otherwise is traced as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# transformers' caches of layers that keep states of fixed shape, or, between others, nothing.
RECURRENT_CACHES = ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "DummyLayer")


@contextmanager
def scanned_recurrences(model: Any) -> Iterator[None]:
    """Meanwhile the recurrences of `model`'s modules are scans that begin with the state."""
    from transformers.cache_utils import Cache

    last = _LastState(Cache.get_recurrent_state)
    replaced: dict[str, Callable[..., Any]] = {
        "torch_chunk_gated_delta_rule": gated_delta_rule,
        "chunk_kimi_delta_attention": gated_delta_rule,
        "mamba_selective_scan": last.selective_scan,
        "mamba2_chunk_scan": mamba2_scan,
    }
    modules = {type(one).__module__ for one in model.modules()}
    before = [
        (sys.modules[module], name, getattr(sys.modules[module], name))
        for module in sorted(modules)
        for name in replaced
        if hasattr(sys.modules[module], name)
    ]
    try:
        setattr(Cache, "get_recurrent_state", last.get)  # noqa: B010
        for module, name, _ in before:
            setattr(module, name, replaced[name])
        yield
    finally:
        setattr(Cache, "get_recurrent_state", last.original)  # noqa: B010
        for module, name, function in before:
            setattr(module, name, function)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule (Yang et al. 2024, equation 10), in float32.

    `query`, `key` `(1, T, key heads, Dk)`, `value` `(1, T, heads, Dv)`, `g` (logarithms of
    decays) and `beta` `(1, T, heads)`, state `(1, heads, Dk, Dv)`. Gives the output, of
    `value`'s shape, and the new state. Each key head serves neighbouring value heads. Kimi's
    delta attention is the same with `g` `(1, T, heads, Dk)`.
    """

    q, k, v, decay, rate = (one[0].float() for one in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    repeats = v.shape[1] // k.shape[1]
    if repeats > 1:
        q, k = q.repeat_interleave(repeats, 1), k.repeat_interleave(repeats, 1)
    q = q * q.shape[-1] ** -0.5

    def step(state: torch.Tensor, now: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
        # Rows (heads, 1, width) and columns (heads, width, 1) around the state (heads, Dk, Dv).
        query_row, key_row, key_column, value_row, decay, rate = now
        state = state * decay
        correction = (value_row - key_row @ state) * rate
        state = state + key_column * correction
        return state, query_row @ state

    inputs = (
        q[:, :, None],
        k[:, :, None],
        k[..., None],
        v[:, :, None],
        decay.exp().reshape(*decay.shape[:2], -1, 1),
        rate[..., None, None],
    )
    state, rows = _scan(step, initial_state[0].float(), inputs)
    return rows[:, :, 0][None].to(query.dtype), state[None]


def mamba2_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    *,
    initial_states: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's state space recurrence (Dao and Gu 2024, equation 1), in float32.

    `hidden_states` `(1, T, heads, width)`, `dt` `(1, T, heads)`, `A` `(heads,)`, `B`, `C`
    `(1, T, groups, N)`, state `(1, heads, width, N)`.
    """
    import torch
    from torch.nn import functional

    x, step_size = hidden_states[0].float(), dt[0].float()
    if dt_bias is not None:
        step_size = step_size + dt_bias.float()
    if dt_softplus:
        step_size = functional.softplus(step_size)
    step_size = torch.clamp(step_size, min=dt_limit[0], max=dt_limit[1])
    repeats = x.shape[1] // B.shape[2]
    enter, leave = (one[0].float().repeat_interleave(repeats, 1) for one in (B, C))

    def step(state: torch.Tensor, now: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
        decay, x_column, enter_row, leave_column = now
        state = state * decay + x_column * enter_row
        return state, state @ leave_column

    inputs = (
        (step_size * A.float()).exp()[..., None, None],
        (x * step_size[..., None])[..., None],
        enter[:, :, None],
        leave[..., None],
    )
    state, columns = _scan(step, initial_states[0].float(), inputs)
    output = columns[..., 0]
    if D is not None:
        output = output + D[..., None] * x
    return output[None].to(hidden_states.dtype), state[None]


class _LastState:
    """Remembers which state a layer asked its cache for, since Mamba's scan is not given it."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self._state: torch.Tensor | None = None
        outer = self

        def get(cache: Any, *args: Any, **kwargs: Any) -> Any:
            outer._state = original(cache, *args, **kwargs)
            return outer._state

        self.get = get

    def selective_scan(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mamba's selective scan (Gu and Dao 2023, algorithm 2), in float32.

        `hidden_states`, `dt` `(1, width, T)`, `A` `(width, N)`, `B`, `C` `(1, N, T)`, state
        `(1, width, N)`.
        """
        from torch.nn import functional

        assert self._state is not None, "a layer asks for its state before it scans"
        x, step_size = hidden_states[0].T.float(), dt[0].T.float()
        if delta_bias is not None:
            step_size = step_size + delta_bias.float()
        if delta_softplus:
            step_size = functional.softplus(step_size)
        rates = A.float()

        def step(state: torch.Tensor, now: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
            size, x_column, enter_row, leave_column = now
            state = state * (size * rates).exp() + x_column * enter_row
            return state, state @ leave_column

        inputs = (
            step_size[..., None],
            (x * step_size)[..., None],
            B[0].T.float()[:, None],
            C[0].T.float()[..., None],
        )
        state, columns = _scan(step, self._state[0].float(), inputs)
        output = columns[..., 0].T[None]
        if D is not None:
            output = output + hidden_states * D[None, :, None]
        if z is not None:
            output = output * functional.silu(z)
        return output.to(hidden_states.dtype), state[None]


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * (x * x).sum(-1, keepdim=True).add(1e-6).rsqrt()


def _scan(
    step: Callable[..., tuple[Any, Any]], state: torch.Tensor, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`state, y = step(state, inputs[t])` for each t; the last state, and all y stacked."""
    from torch._higher_order_ops.scan import scan

    result: tuple[torch.Tensor, torch.Tensor] = scan(step, state, inputs)
    return result
