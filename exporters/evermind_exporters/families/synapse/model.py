"""The whole Synapse model: L + 1 segments, cut where experts run.

Segment s ends layer s-1 (adds its experts' output, then its memory's) and begins layer s
(xLSTM, router); the last one ends in the logits. Formulas: specs/synapse.md, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from evermind_manifests.manifest import (
    DType,
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Layer,
    Plan,
    StateSpec,
    Step,
    ValueSpec,
)
from evermind_manifests.shard import ShardLayout
from evermind_runtime.lcg import Lcg

from ...blueprint import Blueprint
from ...family import Arrays, Config
from ...onnx_graph import ExternalTensor, GraphBuilder
from ..kind import fused_experts
from . import blocks, observations
from .blocks import Block, rms_norm
from .experts import KIND, expert_layout, swiglu, swiglu_kind
from .module import SynapseModule
from .params import EXPERT_TENSORS, fast_weights_of, mamba_of, synapse_parameters, xlstm_of
from .recurrent import GROWTH, mamba_states, memory_states, router_of, xlstm_states

_SAMPLE_TOKENS = 24


class SynapseModel(SynapseModule):
    """The module `model`."""

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return [name for name in self.shapes(config) if ".experts." not in name]

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """See `ModelFamily.expert_names`."""
        prefix = f"layers.{layer}.experts.experts.{expert}."
        return {name: f"{prefix}{name}.weight" for name in EXPERT_TENSORS}

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        uniforms = Lcg(seed).uniforms(_SAMPLE_TOKENS)
        return {"tokens": (uniforms * config["vocab_size"]).astype(np.int64)}

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        count, top_k, experts = (config[key] for key in ("n_layers", "top_k", "n_experts"))
        dims = _Dims(config)
        layout = expert_layout(config, dtype)
        graphs: dict[str, bytes] = {}
        programs: dict[str, list[Step]] = {"prefill": [], "decode": []}
        observed: dict[str, ValueSpec] = {}
        for number in range(count + 1):
            for program in ("prefill", "decode", "observe"):
                segment = _Segment(dims, number, resident, program, layout)
                path = f"graphs/{program}_{number:02d}.onnx"
                graphs[path] = segment.graph
                if program == "decode":
                    programs["decode"].append(segment.step(path))
                else:
                    programs["prefill"].append(segment.step(path))
                observed |= segment.observed
            if number < count:
                programs["prefill"].append(_experts(number))
        outputs = {
            "logits": ValueSpec(
                dtype="f32",
                shape=("T", config["vocab_size"]),
                finite="weights that are not finite, or too large",
            )
        }
        for number in range(count):
            outputs[f"ids.{number}"] = ValueSpec(dtype="i64", shape=("T", top_k))
            outputs[f"gates.{number}"] = ValueSpec(dtype="f32", shape=("T", top_k))
        tokens = ValueSpec(
            dtype="i64", shape=("T",), limit=config["vocab_size"], aliases=("input_ids",)
        )
        # The seed's forward takes labels beside the tokens; they change its loss only.
        labels = ValueSpec(dtype="i64", shape=("T",), default=-100)
        return Blueprint(
            kinds={KIND: swiglu_kind(config, dtype)},
            layers=tuple(
                Layer(layer=number, kind=KIND, experts=experts, top_k=top_k)
                for number in range(count)
            ),
            graphs=graphs,
            plan=Plan(
                inputs={"tokens": tokens, "labels": labels},
                outputs=outputs,
                state=dims.states,
                prefill=tuple(programs["prefill"]),
                decode=tuple(programs["decode"]),
                observations=observed,
                routers=tuple(
                    router_of(config, n, f"ids.{n}", f"gates.{n}", f"probs.{n}")
                    for n in range(count)
                ),
            ),
            active_parameters=synapse_parameters(config)[1],
        )


class _Dims:
    """A configuration, its parts', and every state of the model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mamba = mamba_of(config)
        self.xlstm = xlstm_of(config)
        self.memory: dict[str, Any] | None = None
        if config["use_fast_weights"]:
            self.memory = fast_weights_of(config)
        self.states: dict[str, StateSpec] = {}
        for number in range(config["n_layers"]):
            # Whichever state of a layer is found first, its xLSTM is what usually spoils it.
            cause = f"layer {number}, {GROWTH}"
            of_layer = xlstm_states(self.xlstm, cause) | mamba_states(self.mamba, cause)
            if self.memory is not None:
                of_layer |= memory_states(self.memory, cause)
            self.states |= {f"{name}.{number}": spec for name, spec in of_layer.items()}


@dataclass(slots=True)
class _Segment:
    """One segment's graph in one program, and what it is bound to.

    `observe` is prefill with the observations in place of all other outputs.
    """

    dims: _Dims
    number: int
    resident: Mapping[str, ExternalTensor]
    program: str
    layout: ShardLayout
    graph: bytes = b""
    observed: dict[str, ValueSpec] = field(default_factory=dict)
    _inputs: dict[str, str] = field(default_factory=dict)
    _outputs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        b = GraphBuilder(f"{self.program}_{self.number}", self.resident)
        x = self._ended(b, self._begin(b))
        if self.number == self.dims.config["n_layers"]:
            n = rms_norm(b, x, "final_norm.weight")
            logits = b.op("Gemm", n, b.weight("lm_head.weight"), transB=1)
            self._output(b, "logits", logits, "f32", self.dims.config["vocab_size"], "logits")
        else:
            self._begun(b, x)
        self.graph = b.build()

    def step(self, path: str) -> GraphStep:
        """The plan's step that runs it."""
        fused = None
        if self.program == "decode" and self.number:
            layer = self.number - 1
            fused = FusedExperts(layer=layer, ids=f"ids.{layer}", gates=f"gates.{layer}")
        return GraphStep(graph=path, inputs=self._inputs, outputs=self._outputs, experts=fused)

    @property
    def _tokens(self) -> int | str:
        return 1 if self.program == "decode" else "T"

    def _begin(self, b: GraphBuilder) -> str:
        """The residual stream after the experts of the layer before."""
        config, previous = self.dims.config, self.number - 1
        width, tokens = config["d_model"], self._tokens
        if self.number == 0:
            ids = self._input(b, "tokens", "i64", [tokens], "tokens")
            return str(b.op("Gather", b.weight("embedding.weight"), ids, axis=0))
        base = self._input(b, "base", "f32", [tokens, width], f"base.{previous}")
        if self.program != "decode":
            routed = self._input(b, "routed", "f32", [tokens, width], f"routed.{previous}")
            return str(b.op("Add", base, routed))
        n = self._input(b, "n", "f32", [1, width], f"n.{previous}")
        gates = self._input(b, "gates", "f32", [1, config["top_k"]], f"gates.{previous}")
        return fused_experts(b, n, gates, config["top_k"], self.layout, swiglu, base)

    def _ended(self, b: GraphBuilder, x: str) -> str:
        """The layer before, ended by its memory.

        The memory's answer contains its input, and the block adds its own residual: so the
        published model computes.
        """
        config, layer = self.dims.memory, self.number - 1
        if config is None or layer < 0:
            return x
        n = rms_norm(b, x, f"layers.{layer}.norm3.weight")
        memory = self._state(b, f"fast_weights.{layer}")
        block = Block(b, f"layers.{layer}.memory.", self._tokens)
        found = blocks.fast_weights(block, n, memory, config)
        self._carry(b, f"fast_weights.{layer}", found.memory)
        self._observe(b, "memory", layer, observations.of_memory(b, found, config))
        return str(b.op("Add", x, found.y))

    def _begun(self, b: GraphBuilder, x: str) -> None:
        """This layer up to its routes."""
        dims, layer = self.dims, self.number
        prefix, width = f"layers.{layer}.", dims.config["d_model"]
        cell, normalizer, ssm, window = (
            self._state(b, f"{name}.{layer}")
            for name in ("cell_state", "normalizer_state", "ssm_state", "conv_window")
        )
        language = blocks.xlstm(
            Block(b, f"{prefix}xlstm.", self._tokens),
            rms_norm(b, x, f"{prefix}norm1.weight"),
            cell,
            normalizer,
            dims.xlstm,
        )
        self._observe(b, "xlstm", layer, observations.of_xlstm(b, language, dims.xlstm))
        x = b.op("Add", x, language.y)
        n = rms_norm(b, x, f"{prefix}norm2.weight")
        block = Block(b, f"{prefix}thalamus.", self._tokens)
        routes = blocks.thalamus(block, n, ssm, window, dims.mamba, dims.config["top_k"])
        after = {
            "cell_state": language.cell,
            "normalizer_state": language.normalizer,
            "ssm_state": routes.context.ssm,
            "conv_window": routes.context.window,
        }
        for name, value in after.items():
            self._carry(b, f"{name}.{layer}", value)
        self._output(b, "base_out", x, "f32", width, f"base.{layer}")
        self._output(b, "n_out", n, "f32", width, f"n.{layer}")
        self._output(b, "ids_out", routes.ids, "i64", dims.config["top_k"], f"ids.{layer}")
        self._output(b, "gates_out", routes.gates, "f32", dims.config["top_k"], f"gates.{layer}")
        if self.program == "prefill":
            count = dims.config["n_experts"]
            self._output(b, "probs_out", routes.probabilities, "f32", count, f"probs.{layer}")

    def _input(
        self, b: GraphBuilder, name: str, dtype: DType, dims: list[int | str], value: str
    ) -> str:
        self._inputs[name] = value
        return b.input(name, dtype, dims)

    def _state(self, b: GraphBuilder, name: str) -> str:
        return self._input(b, name, "f32", list(self.dims.states[name].shape), name)

    def _output(
        self, b: GraphBuilder, name: str, made: str, dtype: DType, width: int, value: str
    ) -> None:
        if self.program != "observe":
            b.output(made, name, dtype, [self._tokens, width])
            self._outputs[name] = value

    def _carry(self, b: GraphBuilder, name: str, made: str) -> None:
        """Write a state for the next call."""
        if self.program != "observe":
            b.output(made, f"{name}.next", "f32", self.dims.states[name].shape)
            self._outputs[f"{name}.next"] = name

    def _observe(
        self, b: GraphBuilder, part: str, layer: int, found: observations.Observed
    ) -> None:
        if self.program == "observe":
            for name, (value, spec) in found.items():
                self.observed[f"{part}.{layer}.{name}"] = spec
                b.output(value, f"{part}.{name}", spec.dtype, spec.shape)
                self._outputs[f"{part}.{name}"] = f"{part}.{layer}.{name}"


def _experts(layer: int) -> ExpertsStep:
    return ExpertsStep(
        layer=layer,
        x=f"n.{layer}",
        ids=f"ids.{layer}",
        gates=f"gates.{layer}",
        y=f"routed.{layer}",
    )
