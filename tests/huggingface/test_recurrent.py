"""Recurrences by their definition, against transformers' forms over blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from evermind_exporters.huggingface import recurrent  # noqa: E402

# More than one of transformers' blocks of 64 or 16 tokens, and no multiple of either.
TOKENS, SPLIT, TOLERANCE = 150, 70, 1e-5


@pytest.fixture(autouse=True)
def _eager_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop instead of torch's scan, which is compiled outside of a trace."""

    def loop(step: Callable[..., Any], state: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        rows = []
        for now in zip(*inputs, strict=True):
            state, y = step(state, now)
            rows.append(y)
        return state, torch.stack(rows)

    monkeypatch.setattr(recurrent, "_scan", loop)
    torch.manual_seed(5)


def in_two_parts(
    run: Callable[[tuple[Any, ...], Any], tuple[Any, Any]], inputs: tuple[Any, ...], axis: int
) -> Callable[[Any], tuple[Any, Any]]:
    """`run` on the first tokens, then on the others with the state it left."""
    rest = TOKENS - SPLIT

    def both(state: Any) -> tuple[Any, Any]:
        first, state = run(tuple(one.narrow(axis, 0, SPLIT) for one in inputs), state)
        second, state = run(tuple(one.narrow(axis, SPLIT, rest) for one in inputs), state)
        return torch.cat([first, second], axis), state

    return both


def assert_close(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max() / other.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_gated_delta_rule(per_channel: bool) -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    block_form = chunk_kimi_delta_attention if per_channel else torch_chunk_gated_delta_rule
    key_heads, heads, dk, dv = (4 if per_channel else 2), 4, 16, 24
    keys = torch.randn(2, 1, TOKENS, key_heads, dk)
    decay = torch.rand(1, TOKENS, heads, *([dk] if per_channel else []))
    inputs = (*keys, torch.randn(1, TOKENS, heads, dv), -decay, torch.rand(1, TOKENS, heads))
    state = torch.randn(1, heads, dk, dv)
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    expected = block_form(*inputs[:3], g=-decay, beta=inputs[4], initial_state=state, **options)

    def run(parts: tuple[Any, ...], state: Any) -> tuple[Any, Any]:
        q, k, v, g, beta = parts
        return recurrent.gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, **options)

    assert_close(in_two_parts(run, inputs, 1)(state), expected)


def test_mamba_2() -> None:
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan

    heads, width, groups, size = 4, 8, 2, 6
    inputs = (
        torch.randn(1, TOKENS, heads, width),
        torch.randn(1, TOKENS, heads),
        torch.randn(1, TOKENS, groups, size),
        torch.randn(1, TOKENS, groups, size),
    )
    rates, state = -torch.rand(heads), torch.randn(1, heads, width, size)
    options = {
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads),
        "dt_softplus": True,
        "dt_limit": (0.1, 0.9),
        "return_final_states": True,
    }

    def run_with(scan: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
        def run(parts: tuple[Any, ...], state: Any) -> tuple[Any, Any]:
            x, dt, enter, leave = parts
            result: tuple[Any, Any] = scan(
                x, dt, rates, enter, leave, chunk_size=16, initial_states=state, **options
            )
            return result

        return run

    expected = run_with(mamba2_chunk_scan)(inputs, state)
    assert_close(in_two_parts(run_with(recurrent.mamba2_scan), inputs, 1)(state), expected)


def test_mamba() -> None:
    """transformers' scan begins with zeros; ours goes on where the layer's state is."""
    from transformers.models.jamba.modeling_jamba import mamba_selective_scan

    width, size = 12, 4
    inputs = (
        torch.randn(1, width, TOKENS),
        torch.randn(1, width, TOKENS),
        torch.randn(1, size, TOKENS),
        torch.randn(1, size, TOKENS),
        torch.randn(1, width, TOKENS),
    )
    rates = -torch.rand(width, size)
    options = {
        "D": torch.randn(width),
        "delta_bias": torch.randn(width),
        "delta_softplus": True,
        "return_last_state": True,
    }
    x, dt, enter, leave, gate = inputs
    expected = mamba_selective_scan(x, dt, rates, enter, leave, z=gate, **options)

    def run(parts: tuple[Any, ...], state: Any) -> tuple[Any, Any]:
        x, dt, enter, leave, gate = parts
        layer = recurrent._LastState(lambda _: state)
        layer.get(None)
        return layer.selective_scan(x, dt, rates, enter, leave, z=gate, **options)

    assert_close(in_two_parts(run, inputs, 2)(torch.zeros(1, width, size)), expected)
