"""One expert of any form, traced: the model's own arithmetic between linear layers of ours.

The trace is of a function that multiplies by no weights: where it would, it has an opaque node
`evermind.Project` named after the parameter. In the expert's graph these are the linear layers of
`families/linear.py`, which keep weights in half precision and cast them block by block; all else
(gates, clamps, norms) is what transformers computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import Half

from ..families.kind import Expert
from ..families.linear import Weight, linear
from ..onnx_graph import OPSET, GraphBuilder
from ..reason import reason
from .experts import BIAS, DOWN, GATE_UP, UP, ExpertsModule, apply_gate, has_post_norm
from .half import TORCH_DTYPES
from .matrices import run_with

if TYPE_CHECKING:
    import onnx
    import torch

_DOMAIN, _PROJECT = "evermind", "Project"
# A constant of an expert's graph is stored in it, once for the whole kind.
_CONSTANT_BYTES = 4096


def trace_expert(
    model: Any, described: ExpertsModule, compute: Literal["f32"] | Half = "f32"
) -> Expert:
    """The arithmetic of one of these experts, in `compute`; `model` may lie on the meta device.

    Raises `UnsupportedError` for arithmetic that cannot be exported, or has weights of its own.
    """
    import torch

    class OneExpert(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _one_expert(model.get_submodule(described.path), described, x)

    try:
        program = torch.onnx.export(
            OneExpert().eval(),
            (torch.zeros(3, described.width, dtype=getattr(torch, TORCH_DTYPES[compute])),),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
            verbose=False,
        )
    except Exception as error:
        raise UnsupportedError(
            f"{described.path}: what one of its experts computes cannot be exported to ONNX: "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    assert program is not None, "torch.onnx.export gives a program"
    return _Traced(program.model, described)


def _one_expert(module: Any, described: ExpertsModule, x: torch.Tensor) -> torch.Tensor:
    """What the module computes with one expert, as `transformers.integrations.moe` has it."""
    parts = {part.name: part for part in described.parameters}

    def project(value: torch.Tensor, name: str, width: int) -> torch.Tensor:
        import torch

        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_PROJECT}",
            (value,),
            attrs={"parameter": name},
            dtype=value.dtype,
            shape=(value.shape[0], width),
            version=1,
        )

    if described.parameters[0].flat:
        matrices = {name: tuple(getattr(module, name).shape) for name in parts}
        one = {name: (rows // described.experts, width) for name, (rows, width) in matrices.items()}
        return run_with(module, x, one, lambda x, it: project(x, it.parameter, it.width))

    def linear_(value: torch.Tensor, name: str) -> torch.Tensor:
        return project(value, name, sum(described.tensors[t][0] for t in parts[name].tensors))

    hidden = (
        apply_gate(module, linear_(x, GATE_UP))
        if GATE_UP in parts
        else module.act_fn(linear_(x, UP))
    )
    y = linear_(hidden, DOWN)
    return module.post_expert_norm(y) if has_post_norm(module) else y


class _Traced:
    """An `Expert`: the traced nodes, with linear layers in the place of opaque ones."""

    def __init__(self, program: Any, described: ExpertsModule) -> None:
        import onnx_ir

        graph = program.graph
        if len(program.functions):
            raise UnsupportedError(f"{described.path}: the traced expert has functions of its own")
        self._parts = {part.name: part for part in described.parameters}
        self._input = str(graph.inputs[0].name)
        self._output = str(graph.outputs[0].name)
        self._nodes: list[onnx.NodeProto] = [onnx_ir.to_proto(node) for node in graph]
        for node in self._nodes:
            odd = node.domain not in ("", _DOMAIN)
            if odd or any(one.HasField("g") or one.graphs for one in node.attribute):
                raise UnsupportedError(f"{described.path}: the traced expert has {node.op_type}")
        self._constants = {}
        for name, value in graph.initializers.items():
            array = np.asarray(value.const_value.numpy())
            if array.nbytes > _CONSTANT_BYTES:
                raise UnsupportedError(
                    f"{described.path}: experts with a constant of {array.nbytes:,} bytes, {name}"
                )
            self._constants[str(name)] = array

    def __call__(self, b: GraphBuilder, x: str, weights: Mapping[str, Weight]) -> str:
        """See `Expert`."""
        values = {self._input: x, "": ""}
        for name, array in self._constants.items():
            values[name] = b.const(array, array.dtype)
        for node in self._nodes:
            inputs = [values[name] for name in node.input]
            if node.domain == _DOMAIN:
                (name,) = (one.s.decode() for one in node.attribute if one.name == "parameter")
                values[node.output[0]] = self._project(b, inputs[0], name, weights)
                continue
            values.update(zip(node.output, b.copy(node, inputs), strict=True))
        return values[self._output]

    def _project(
        self, b: GraphBuilder, x: str, parameter: str, weights: Mapping[str, Weight]
    ) -> str:
        bias = self._parts.get(parameter + BIAS)
        products = [
            linear(b, x, weights[name], None if bias is None else weights[bias.tensors[number]])
            for number, name in enumerate(self._parts[parameter].tensors)
        ]
        return products[0] if len(products) == 1 else str(b.op("Concat", *products, axis=-1))
