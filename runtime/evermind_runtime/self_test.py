"""Do the pooled programs compute what the others do? Asked before they are used.

They rest on an operator outside the ONNX standard whose meaning has changed between versions of
ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from evermind_manifests.errors import EvermindPackError
from evermind_manifests.manifest import Plan, Step

from .arrays import slice_tokens
from .devices import numpy_dtype
from .program import Engine, run_program
from .state import Array, State

_TOKENS = 3
# Of the largest magnitude. Sums in another order differ in the sixth digit, a wrong gate in
# the first.
_TOLERANCE = 1e-3


def pooled_fault(pooled: Engine, paged: Engine) -> str | None:
    """Run a few tokens through all programs, at once and one by one; says what differs."""
    plan = pooled.manifest.plan
    inputs = sample_inputs(plan, _TOKENS)
    at_once = [inputs]
    in_turn = [slice_tokens(plan, inputs, token, token + 1) for token in range(_TOKENS)]
    try:
        for mine, expected in (
            (_run(pooled, pooled.prefill, at_once), _run(paged, paged.prefill, at_once)),
            (_run(pooled, pooled.decode, in_turn), _run(paged, paged.decode, in_turn)),
        ):
            for (name, found), right in zip(mine, (array for _, array in expected), strict=True):
                scale = float(np.abs(right).max(initial=0))
                worst = float(np.abs(found - right).max(initial=0))
                if not worst <= _TOLERANCE * scale:
                    return f"{name}: off by {worst:.3g} at a magnitude of {scale:.3g}"
    except EvermindPackError as error:
        return str(error)
    return None


def _run(
    engine: Engine, steps: Sequence[Step], calls: Sequence[Mapping[str, Array]]
) -> list[tuple[str, Array]]:
    """Every output of every call, then the state."""
    plan = engine.manifest.plan
    state = State(plan)
    names = {name: spec.value or name for name, spec in plan.outputs.items()}
    found: list[tuple[str, Array]] = []
    for inputs in calls:
        values = run_program(engine, steps, inputs, state, list(names.values()))
        found += ((name, values[value]) for name, value in names.items())
    return found + list(state.save().items())


def sample_inputs(plan: Plan, tokens: int, seed: int = 0) -> Mapping[str, Array]:
    """Random inputs for some tokens: indices below their limit, normal numbers, or zeros."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for name, spec in plan.inputs.items():
        shape = [tokens if isinstance(dim, str) else dim for dim in spec.shape]
        if spec.limit is not None:
            drawn: Array = rng.integers(0, spec.limit, shape)
        elif spec.dtype in ("f32", "f64"):
            drawn = rng.normal(size=shape)
        else:
            drawn = np.zeros(shape)
        inputs[name] = drawn.astype(numpy_dtype(spec.dtype))
    return inputs
