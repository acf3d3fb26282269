"""Experts in every form that transformers marks: the traced kind against its own computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evermind_exporters.huggingface.expert_kinds import ExpertKinds
from evermind_exporters.huggingface.experts import ExpertsModule, find_experts
from evermind_manifests.dtypes import encode
from evermind_manifests.errors import UnsupportedError
from evermind_manifests.manifest import DType
from evermind_runtime import onnx_runtime

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

EXPERTS, WIDTH, INNER, ROWS = 3, 16, 24, 5


class Norm(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer(
    *,
    gate: bool = True,
    bias: bool = False,
    transposed: bool = False,
    concatenated: bool = True,
    norm: bool = False,
    activation: Any = torch.nn.functional.silu,
    clamp: float | None = None,
    inner: int = INNER,
) -> Any:
    """A module of experts, marked as transformers marks them."""
    from transformers.integrations.moe import use_experts_implementation

    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = EXPERTS
            self.act_fn = activation
            if norm:
                self.post_expert_norm = Norm()
            first = "gate_up_proj" if gate else "up_proj"
            for name, rows, width in (
                (first, inner * (2 if gate else 1), WIDTH),
                ("down_proj", WIDTH, inner),
            ):
                shape = (width, rows) if transposed else (rows, width)
                parameter = torch.nn.Parameter(torch.empty(EXPERTS, *shape))
                self.register_parameter(name, parameter)
                if bias:
                    parameter = torch.nn.Parameter(torch.empty(EXPERTS, rows))
                    self.register_parameter(f"{name}_bias", parameter)

        def forward(self, x: Any, ids: Any, gates: Any) -> Any:
            raise NotImplementedError

        if clamp is not None or not concatenated:

            def _apply_gate(self, both: Any) -> Any:
                if concatenated:
                    first, second = both.chunk(2, dim=-1)
                else:
                    first, second = both[..., ::2], both[..., 1::2]
                if clamp is not None:
                    first = first.clamp(max=clamp)
                return self.act_fn(first) * (second + 1)

    marked = use_experts_implementation(
        has_gate=gate,
        has_bias=bias,
        is_transposed=transposed,
        is_concatenated=concatenated,
        has_post_expert_norm=norm,
    )
    made = marked(Experts)(None)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return made


def stored(module: Any, described: ExpertsModule, expert: int) -> dict[str, np.ndarray[Any, Any]]:
    """One expert's tensors `(out, in)`, as the shards have them."""
    tensors = {}
    for part in described.parameters:
        whole = getattr(module, part.name)[expert].detach().numpy()
        whole = whole.T if part.transposed else whole
        rows = 0
        for name in part.tensors:
            height = described.tensors[name][0]
            tensors[name] = np.ascontiguousarray(whole[rows : rows + height])
            rows += height
    return tensors


def kinds_of(model: Any, dtype: DType = "f32") -> tuple[list[ExpertsModule], ExpertKinds]:
    modules = find_experts(model)
    return modules, ExpertKinds(
        model, modules, [dict.fromkeys(one.tensors, dtype) for one in modules]
    )


def computed(graph: bytes, x: np.ndarray[Any, Any], tensors: dict[str, Any]) -> Any:
    onnx_runtime.start()  # Whichever test comes first: a process has one pool for all sessions.
    session = onnx_runtime.require().InferenceSession(
        graph, onnx_runtime.session_options(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x, **tensors})[0]


def expected(module: Any, x: np.ndarray[Any, Any], expert: int) -> Any:
    from transformers.integrations.moe import batched_mm_experts_forward

    ids = torch.full((len(x), 1), expert)
    with torch.no_grad():
        return batched_mm_experts_forward(
            module, torch.from_numpy(x), ids, torch.ones(len(x), 1)
        ).numpy()


FORMS: dict[str, dict[str, Any]] = {
    "interleaved, transposed, with biases, clamped": {
        "bias": True,
        "transposed": True,
        "concatenated": False,
        "clamp": 0.5,
    },
    "no gate": {"gate": False, "activation": torch.nn.functional.relu},
    "gelu, with biases and a norm after": {
        "bias": True,
        "norm": True,
        "activation": torch.nn.functional.gelu,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_kind_computes_what_transformers_does(form: str) -> None:
    module = layer(**FORMS[form])
    (described,), kinds = kinds_of(torch.nn.ModuleDict({"experts": module}))
    assert not described.swiglu
    x = np.random.default_rng(3).normal(size=(ROWS, WIDTH)).astype(np.float32)
    for expert in (0, EXPERTS - 1):
        found = computed(kinds.blueprints["expert"].graph, x, stored(module, described, expert))
        np.testing.assert_allclose(found, expected(module, x, expert), rtol=2e-5, atol=2e-5)


def test_transposed_silu_experts_keep_the_graph_of_swiglu() -> None:
    plain, transposed = layer(), layer(transposed=True)
    graphs = []
    for module in (plain, transposed):
        (described,), kinds = kinds_of(torch.nn.ModuleDict({"experts": module}))
        assert described.swiglu
        assert list(kinds.blueprints) == ["swiglu"]
        x = np.random.default_rng(3).normal(size=(ROWS, WIDTH)).astype(np.float32)
        graphs.append(kinds.blueprints["swiglu"].graph)
        found = computed(graphs[-1], x, stored(module, described, 1))
        np.testing.assert_allclose(found, expected(module, x, 1), rtol=2e-5, atol=2e-5)
    assert graphs[0] == graphs[1]


def test_a_clamp_that_bites_late_is_no_silu() -> None:
    clamped = layer(activation=lambda x: torch.nn.functional.silu(x.clamp(max=100.0)))
    (described,) = find_experts(torch.nn.ModuleDict({"experts": clamped}))
    assert not described.swiglu


def test_layers_that_compute_alike_share_a_kind() -> None:
    """Two widths of SwiGLU, one of another form; half-precision weights stay half."""
    relu = {"gate": False, "activation": torch.nn.functional.relu}
    made = [layer(), layer(inner=8), layer(**relu), layer(), layer(**relu)]
    modules, kinds = kinds_of(torch.nn.ModuleList(made), "f16")
    assert kinds.of == ["swiglu", "swiglu_2", "expert", "swiglu", "expert"]
    layout = kinds.blueprints["expert"].layout
    assert {spec.dtype for spec in layout.tensors} == {"f16"}
    tensors = stored(made[2], modules[2], 0)
    half = {name: encode(one, "f16") for name, one in tensors.items()}
    with torch.no_grad():
        for parameter in made[2].parameters():
            parameter.copy_(parameter.half().float())
    x = np.random.default_rng(3).normal(size=(ROWS, WIDTH)).astype(np.float32)
    found = computed(kinds.blueprints["expert"].graph, x, half)
    np.testing.assert_allclose(found, expected(made[2], x, 0), rtol=2e-5, atol=2e-5)


def test_a_fused_graph_adds_the_experts_in_their_order() -> None:
    module = layer(gate=False, bias=True, activation=torch.nn.functional.relu)
    (described,), kinds = kinds_of(torch.nn.ModuleDict({"experts": module}))
    x = np.random.default_rng(3).normal(size=(1, WIDTH)).astype(np.float32)
    gates = np.array([[0.75, 0.25]], np.float32)
    tensors = {
        f"expert{place}.{name}": one
        for place, expert in enumerate((2, 0))
        for name, one in stored(module, described, expert).items()
    }
    found = computed(kinds.fused("expert", 2), x, {"gates": gates, **tensors})
    both = 0.75 * expected(module, x, 2) + 0.25 * expected(module, x, 0)
    np.testing.assert_allclose(found, both, rtol=2e-5, atol=2e-5)


def test_experts_of_an_unknown_form_are_refused() -> None:
    module = layer()
    module.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedError, match="extra"):
        find_experts(torch.nn.ModuleDict({"experts": module}))
    odd = layer(activation=lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(UnsupportedError, match="cannot be exported"):
        kinds_of(torch.nn.ModuleDict({"experts": odd}))


def unmarked(model_type: str, **changed: Any) -> Any:
    """A model whose experts transformers does not mark, without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .tiny import CARRIED, COMMON

    config = AutoConfig.for_model(model_type, **{**COMMON, **CARRIED[model_type], **changed})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_experts_without_a_mark_are_recognised_by_what_they_hold_and_take() -> None:
    first, *_ = find_experts(unmarked("dbrx"))
    assert (first.call, first.path) == ("routed", f"{first.caller}.mlp")
    # Of the three, the last is multiplied by as it lies.
    assert first.tensors == {"w1": (24, 32), "v1": (24, 32), "w2": (32, 24)}
    assert [part.transposed for part in first.parameters] == [False, False, True]
    first, *_ = find_experts(unmarked("llama4_text"))
    assert (first.call, first.path) == ("sorted", first.caller)
    assert first.swiglu
    assert all(part.transposed for part in first.parameters)


def test_weighed_inputs_of_several_experts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="only one"):
        find_experts(unmarked("llama4_text", num_experts_per_tok=2))
