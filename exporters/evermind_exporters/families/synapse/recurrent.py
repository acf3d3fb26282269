"""The Synapse modules without experts, each a package of its own: one graph per program.

Inputs and outputs have the names of the published modules; a module's state is an output too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from evermind_manifests.manifest import DType, GraphStep, Plan, Router, StateSpec, ValueSpec
from evermind_runtime.lcg import Lcg

from ...blueprint import Blueprint
from ...family import Arrays, Config
from ...onnx_graph import ExternalTensor, GraphBuilder
from . import blocks, observations
from .blocks import Block
from .experts import sample_rows
from .module import SynapseModule
from .params import expert_names, mamba_of, synapse_parameters

# The usual causes of states that are not finite.
GROWTH: Final = (
    "the xLSTM's memory: its gates are exponentials without a stabiliser, so that it grows by the "
    "factor exp(w_f x + b) with every token"
)
_SIZE: Final = "the input or the weights: the state holds products of them, too large for float32"


@dataclass(slots=True)
class Fragment:
    """What a module adds to a graph: values by name, with their shapes and dtypes."""

    outputs: dict[str, tuple[str, ValueSpec]] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    observed: dict[str, tuple[str, ValueSpec]] = field(default_factory=dict)


def mamba_states(config: Config, cause: str = _SIZE) -> dict[str, StateSpec]:
    """What a Mamba carries: its state, and its convolution's last inputs."""
    inner = config["d_inner"]
    return {
        "ssm_state": StateSpec(dtype="f32", shape=(inner, config["d_state"]), finite=cause),
        "conv_window": StateSpec(dtype="f32", shape=(config["d_conv"] - 1, inner), finite=cause),
    }


def xlstm_states(config: Config, cause: str = GROWTH) -> dict[str, StateSpec]:
    """What an xLSTM carries."""
    heads, size = config["n_heads"], config["d_head"]
    return {
        "cell_state": StateSpec(dtype="f32", shape=(heads, size, size), finite=cause),
        "normalizer_state": StateSpec(dtype="f32", shape=(heads, size), init=1.0, finite=cause),
    }


def memory_states(config: Config, cause: str = _SIZE) -> dict[str, StateSpec]:
    """What a fast-weight memory carries."""
    shape = (config["n_heads"], config["d_key"], config["d_value"])
    return {"fast_weights": StateSpec(dtype="f32", shape=shape, finite=cause)}


class RecurrentModule(SynapseModule):
    """A module of one graph: `x` `(T, d)` and states in, outputs and states out."""

    @abstractmethod
    def states(self, config: Config) -> dict[str, StateSpec]:
        """Its states by name."""

    @abstractmethod
    def fragment(self, block: Block, x: str, states: Mapping[str, str], config: Config) -> Fragment:
        """Add the module to a graph."""

    def routers(self, config: Config) -> tuple[Router, ...]:
        """Its routers, for introspection."""
        return ()

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        return {"x": sample_rows(Lcg(seed), config)}

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        states = self.states(config)
        graphs: dict[str, bytes] = {}
        steps: dict[str, GraphStep] = {}
        made = Fragment()
        tokens: int | str
        for program, tokens in (("prefill", "T"), ("decode", 1), ("observe", "T")):
            b = GraphBuilder(program, resident)
            x = b.input("x", "f32", [tokens, config["d_model"]])
            given = {name: b.input(name, "f32", spec.shape) for name, spec in states.items()}
            made = self.fragment(Block(b, "", tokens), x, given, config)
            shown = made.observed if program == "observe" else made.outputs
            for name, (value, spec) in shown.items():
                dims = [tokens if dim == "T" else dim for dim in spec.shape]
                b.output(value, f"{name}_out", spec.dtype, dims)
            bound = {f"{name}_out": name for name in shown}
            if program != "observe":
                for name, value in made.states.items():
                    b.output(value, f"{name}_next", "f32", states[name].shape)
                    bound[f"{name}_next"] = name
            if not bound:
                continue
            path = f"graphs/{program}.onnx"
            graphs[path] = b.build()
            inputs = {name: name for name in ("x", *states)}
            steps[program] = GraphStep(graph=path, inputs=inputs, outputs=bound)
        outputs = {name: spec for name, (_, spec) in made.outputs.items()}
        outputs |= {
            name: ValueSpec(dtype="f32", shape=spec.shape)
            for name, spec in states.items()
            if name != "conv_window"
        }
        return Blueprint(
            kinds={},
            layers=(),
            graphs=graphs,
            plan=Plan(
                inputs={"x": ValueSpec(dtype="f32", shape=("T", config["d_model"]))},
                outputs=outputs,
                state=states,
                prefill=tuple(steps[name] for name in ("prefill", "observe") if name in steps),
                decode=(steps["decode"],),
                observations={name: spec for name, (_, spec) in made.observed.items()},
                routers=self.routers(config),
            ),
            active_parameters=synapse_parameters(config)[1],
        )


class MambaModule(RecurrentModule):
    """The state-space model of a router."""

    def states(self, config: Config) -> dict[str, StateSpec]:
        """See `RecurrentModule.states`."""
        return mamba_states(config)

    def fragment(self, block: Block, x: str, states: Mapping[str, str], config: Config) -> Fragment:
        """See `RecurrentModule.fragment`."""
        found = blocks.mamba(block, x, states["ssm_state"], states["conv_window"], config)
        y = ValueSpec(dtype="f32", shape=("T", config["d_model"]))
        return Fragment({"y": (found.y, y)}, _mamba_after(found))


class ThalamusModule(RecurrentModule):
    """A router: its routes, not its experts."""

    def states(self, config: Config) -> dict[str, StateSpec]:
        """See `RecurrentModule.states`."""
        return mamba_states(mamba_of(config))

    def routers(self, config: Config) -> tuple[Router, ...]:
        """See `RecurrentModule.routers`."""
        return (router_of(config, 0, "expert_indices", "routing_weights", "routing_probs"),)

    def fragment(self, block: Block, x: str, states: Mapping[str, str], config: Config) -> Fragment:
        """See `RecurrentModule.fragment`."""
        found = blocks.thalamus(
            block,
            x,
            states["ssm_state"],
            states["conv_window"],
            mamba_of(config),
            config["top_k"],
        )
        chosen, experts = ("T", config["top_k"]), ("T", config["n_experts"])
        context = ValueSpec(dtype="f32", shape=("T", config["d_model"]))
        return Fragment(
            {
                "expert_indices": (found.ids, ValueSpec(dtype="i64", shape=chosen)),
                "routing_weights": (found.gates, ValueSpec(dtype="f32", shape=chosen)),
                "routing_probs": (found.probabilities, ValueSpec(dtype="f32", shape=experts)),
                "context": (found.context.y, context),
            },
            _mamba_after(found.context),
        )


class XlstmModule(RecurrentModule):
    """The language module."""

    def states(self, config: Config) -> dict[str, StateSpec]:
        """See `RecurrentModule.states`."""
        return xlstm_states(config)

    def fragment(self, block: Block, x: str, states: Mapping[str, str], config: Config) -> Fragment:
        """See `RecurrentModule.fragment`."""
        found = blocks.xlstm(block, x, states["cell_state"], states["normalizer_state"], config)
        y = ValueSpec(dtype="f32", shape=("T", config["d_model"]))
        return Fragment(
            {"y": (found.y, y)},
            {"cell_state": found.cell, "normalizer_state": found.normalizer},
            observations.of_xlstm(block.b, found, config),
        )


class FastWeightsModule(RecurrentModule):
    """The fast-weight memory."""

    def states(self, config: Config) -> dict[str, StateSpec]:
        """See `RecurrentModule.states`."""
        return memory_states(config)

    def fragment(self, block: Block, x: str, states: Mapping[str, str], config: Config) -> Fragment:
        """See `RecurrentModule.fragment`."""
        found = blocks.fast_weights(block, x, states["fast_weights"], config)
        y = ValueSpec(dtype="f32", shape=("T", config["d_model"]))
        return Fragment(
            {"y": (found.y, y)},
            {"fast_weights": found.memory},
            observations.of_memory(block.b, found, config),
        )


def router_of(config: Config, layer: int, ids: str, gates: str, probabilities: str) -> Router:
    """What introspection reads of a thalamus."""
    return Router(
        layer=layer,
        ids=ids,
        gates=gates,
        probabilities=probabilities,
        names=expert_names(config["n_experts"]),
        rate=config["hebbian_lr"],
        decay=config["hebbian_decay"],
    )


def _mamba_after(found: blocks.MambaValues) -> dict[str, str]:
    return {"ssm_state": found.ssm, "conv_window": found.window}
