"""`limbic`: one recurrent step, `x, hidden, state` to `hidden, delta, reward`; no experts.

Formulas: specs/evermind-formats.md, section 7.4. The model is tiny and its reward is a
double in the peer, so the whole graph computes in double and rounds its outputs once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from evermind_manifests.manifest import DType, GraphStep, Plan, ValueSpec
from evermind_runtime.lcg import Lcg

from ..blueprint import Blueprint
from ..family import Arrays, Config
from ..onnx_graph import ExternalTensor, GraphBuilder
from .evermind import EvermindFamily

_GRAPH: Final = "graphs/step.onnx"


class Limbic(EvermindFamily):
    """See the module."""

    name = "limbic"

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return list(self.shapes(config))

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        lcg = Lcg(seed)
        widths = {"x": "inputDim", "hidden": "hiddenDim", "state": "stateDim"}
        return {
            name: lcg.gaussian(4 * config[key], 0.5).reshape(4, config[key])
            for name, key in widths.items()
        }

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        inputs, hidden, state = config["inputDim"], config["hiddenDim"], config["stateDim"]
        b = GraphBuilder("limbic_step", resident)
        x = b.cast(b.input("x", "f32", ["T", inputs]), "f64")
        h = b.cast(b.input("hidden", "f32", ["T", hidden]), "f64")
        s = b.cast(b.input("state", "f32", ["T", state]), "f64")
        w = {name: b.cast(b.weight(name), "f64") for name in resident}

        pre = b.op(
            "Add",
            b.op("Gemm", x, w["win"], transB=1),
            b.op("Gemm", s, w["ws"], transB=1),
        )
        # The peer rounds a, t, h' and delta to float32 when it stores them.
        a = _rounded(b, b.op("Sigmoid", w["aLogit"]))
        t = _rounded(b, b.op("Tanh", pre))
        keep = b.op("Mul", a, h)
        fresh = b.op("Mul", b.op("Sub", b.const(1.0, np.float64), a), t)
        h_next = _rounded(b, b.op("Add", keep, fresh))
        delta = b.op("Tanh", b.op("Gemm", h_next, w["woutState"], w["boutState"], transB=1))
        weights = b.op("Unsqueeze", w["woutReward"], b.const([0]))
        reward = b.op("Gemm", h_next, weights, w["boutReward"], transB=1)

        b.output(b.cast(h_next, "f32"), "hidden_out", "f32", ["T", hidden])
        b.output(b.cast(delta, "f32"), "delta", "f32", ["T", state])
        b.output(b.cast(b.op("Squeeze", reward, b.const([1])), "f32"), "reward", "f32", ["T"])
        step = GraphStep(
            graph=_GRAPH,
            inputs={"x": "x", "hidden": "hidden", "state": "state"},
            outputs={"hidden_out": "hidden_next", "delta": "delta", "reward": "reward"},
        )
        return Blueprint(
            kinds={},
            layers=(),
            graphs={_GRAPH: b.build()},
            plan=Plan(
                inputs={
                    "x": ValueSpec(dtype="f32", shape=("T", inputs)),
                    "hidden": ValueSpec(dtype="f32", shape=("T", hidden), default=0.0),
                    "state": ValueSpec(dtype="f32", shape=("T", state), default=0.0),
                },
                outputs={
                    "hidden": ValueSpec(dtype="f32", shape=("T", hidden), value="hidden_next"),
                    "delta": ValueSpec(dtype="f32", shape=("T", state)),
                    "reward": ValueSpec(dtype="f32", shape=("T",)),
                },
                state={},
                prefill=(step,),
                decode=(step,),
            ),
            active_parameters=self.parameter_count(config),
        )


def _rounded(b: GraphBuilder, value: str) -> str:
    return b.cast(b.cast(value, "f32"), "f64")


FAMILY = Limbic()
