"""Do the pooled programs compute what the others do? Asked before they are used.

They rest on an operator outside the ONNX standard whose meaning has changed between versions of
ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from evermind_manifests.errors import EvermindPackError
from evermind_manifests.manifest import Plan

from .devices import numpy_dtype
from .program import Engine, run_program
from .state import Array, State

_TOKENS = 3
# Of the largest magnitude. Sums in another order differ in the sixth digit, a wrong gate in
# the first.
_TOLERANCE = 1e-3


def pooled_fault(pooled: Engine, paged: Engine) -> str | None:
    """Run a few tokens through both decode programs; says what differs, if anything does."""
    plan = pooled.manifest.plan
    names = {name: spec.value or name for name, spec in plan.outputs.items()}
    states = [State(plan), State(plan)]
    for token in range(_TOKENS):
        inputs = sample_inputs(plan, seed=token)
        try:
            mine, expected = (
                run_program(engine, engine.decode, inputs, state, list(names.values()))
                for engine, state in zip((pooled, paged), states, strict=True)
            )
        except EvermindPackError as error:
            return str(error)
        for name, value in names.items():
            scale = float(np.abs(expected[value]).max(initial=0))
            if not np.allclose(mine[value], expected[value], rtol=0, atol=_TOLERANCE * scale):
                worst = float(np.abs(mine[value] - expected[value]).max())
                return f"{name}: off by {worst:.3g} at a magnitude of {scale:.3g}"
    return None


def sample_inputs(plan: Plan, seed: int) -> Mapping[str, Array]:
    """Random inputs for one token: indices below their limit, normal numbers, or zeros."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for name, spec in plan.inputs.items():
        shape = [1 if isinstance(dim, str) else dim for dim in spec.shape]
        if spec.limit is not None:
            drawn: Array = rng.integers(0, spec.limit, shape)
        elif spec.dtype in ("f32", "f64"):
            drawn = rng.normal(size=shape)
        else:
            drawn = np.zeros(shape)
        inputs[name] = drawn.astype(numpy_dtype(spec.dtype))
    return inputs
