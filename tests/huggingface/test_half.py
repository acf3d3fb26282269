"""Graphs that compute in half precision: against transformers' own, and CUDA's kernels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from evermind_exporters.huggingface import import_
from evermind_exporters.huggingface.cuda_kernels import KERNELS
from evermind_exporters.huggingface.emulation import Emulated, emulate, emulated_graph
from evermind_exporters.huggingface.half import fit_for_cuda, with_float_edges
from evermind_exporters.huggingface.import_ import ImportOptions, import_checkpoint
from evermind_exporters.huggingface.variant import tolerance
from evermind_manifests.errors import ConfigError, DeviceError, InputError, UnsupportedError
from evermind_manifests.manifest import GraphStep, Half, Manifest
from evermind_manifests.package import Package, open_package
from evermind_manifests.variants import computing
from evermind_runtime import onnx_runtime
from evermind_runtime.choose_compute import ComputeName
from evermind_runtime.model import Model
from evermind_runtime.parity import compare_parity, compare_variant, typical_error
from onnx import TensorProto, helper

from tests.cli.command_line import call

from .conftest import FORMS, Imported
from .test_parity import logits_of

ELEMENTS: dict[Half, int] = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()
needs_cuda = pytest.mark.skipif(
    not HAS_CUDA, reason="this ONNX Runtime has no CUDA provider (install evermind-pack[cuda])"
)


@pytest.fixture
def half(imported: Callable[[str], Imported], model_type: str) -> Imported:
    if "dtype" not in FORMS.get(model_type, {}):
        pytest.skip("imported in float32 alone")
    return imported(model_type)


def variant_of(package: Path) -> tuple[Half, Manifest]:
    with open_package(package) as opened:
        (compute,) = opened.manifest.variants
        return compute, computing(opened.manifest, compute)


def graphs_of(manifest: Manifest) -> set[str]:
    plan = manifest.plan
    steps = {one.graph for one in (*plan.prefill, *plan.decode) if isinstance(one, GraphStep)}
    return {*steps, *(one.graph for one in plan.guesses)} | {
        kind.graph for kind in manifest.kinds.values()
    }


def runnable(package: Package, compute: Half, folder: Path) -> Package:
    """The variant as a CPU runs it: float16 as it is, bfloat16 emulated."""
    if compute == "f16":
        return package.computing(compute)
    folder.mkdir(exist_ok=True)
    emulate(Path(package.location), compute, folder)
    return Emulated(package, compute, folder)


def logits(package: Package, tokens: list[int], **options: Any) -> Iterator[npt.NDArray[Any]]:
    given = {"budget": None, "device": "cpu", "threads": None, "verify": "first"} | options
    model = Model(package, **given)
    for steps in ("prefill", "decode"):
        yield model.forward({"tokens": tokens}, steps=steps)["logits"]


def test_it_is_no_further_from_float32_than_transformers_in_half_precision(half: Imported) -> None:
    assert half.half.compute == variant_of(half.package)[0]
    # Both are sums of rounding errors; the tolerance of an import is three times transformers' own.
    bound = tolerance(half.half.compute, half.half.own_error)
    assert 0 < half.half.error <= bound
    with open_package(half.package) as package:
        assert package.manifest.variants[half.half.compute].tolerance == bound


def test_both_programs_agree_and_paging_changes_no_bit(half: Imported, tmp_path: Path) -> None:
    compute, _ = variant_of(half.package)
    tokens = np.random.default_rng(7).integers(0, 96, 40).tolist()
    expected = logits_of(half.model, tokens)
    with open_package(half.package) as package, warnings.catch_warnings():
        warnings.simplefilter("ignore", em.PagingWarning)
        variant = runnable(package, compute, tmp_path / "graphs")
        total = sum(one.bytes for one in package.manifest.shards)
        whole = list(logits(variant, tokens, plan="paged"))
        paged = list(logits(variant, tokens, plan="paged", budget=total // 3))
    for one, other in zip(whole, paged, strict=True):
        np.testing.assert_array_equal(one, other)
    error = typical_error(expected, whole[0])
    assert typical_error(whole[0], whole[1]) <= max(error, 2.0**-8)
    assert error <= tolerance(compute, half.half.own_error)
    assert np.abs(expected - whole[0]).max() > 1e-5 * np.abs(expected).max()  # it is not float32


def test_weights_in_half_precision_are_taken_as_they_are(half: Imported) -> None:
    compute, manifest = variant_of(half.package)
    cast = taken = 0
    for path in graphs_of(manifest):
        graph = onnx.load(half.package / path, load_external_data=False).graph
        stored = {one.name: one.data_type for one in graph.initializer}
        stored |= {one.name: one.type.tensor_type.elem_type for one in graph.input}
        stored = {name: one for name, one in stored.items() if one == ELEMENTS[compute]}
        for node in graph.node:
            cast += node.op_type == "Cast" and node.input[0] in stored
            taken += sum(name in stored for name in node.input)
    # What transformers keeps in float32 (norms, routers) is small; no expert's matrix is cast.
    assert taken > 3 * cast
    kinds = [kind.graph for kind in manifest.kinds.values()]
    for path in kinds:
        graph = onnx.load(half.package / path).graph
        weights = {one.name for one in graph.input} - {"x"}
        assert not any(one.op_type == "Cast" and one.input[0] in weights for one in graph.node)


def test_every_node_in_half_precision_has_a_kernel_on_cuda(half: Imported) -> None:
    compute, manifest = variant_of(half.package)
    computed = 0
    for path in graphs_of(manifest):
        model = onnx.load(half.package / path, load_external_data=False)
        graph = onnx.shape_inference.infer_shapes(model).graph
        types = {one.name: one.type.tensor_type.elem_type for one in graph.value_info}
        types |= {one.name: one.type.tensor_type.elem_type for one in (*graph.input, *graph.output)}
        types |= {one.name: one.data_type for one in graph.initializer}
        for node in graph.node:
            found = {types.get(name) for name in (*node.input, *node.output)} & set(
                ELEMENTS.values()
            )
            assert found <= {ELEMENTS[compute]}, (path, node.op_type)
            if found:
                name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                assert name in KERNELS[compute], (path, name)
                computed += node.op_type in ("Gemm", "MatMul", "FusedMatMul")
    assert computed > 4


def test_experts_are_chosen_by_scores_in_float32(imported: Callable[[str], Imported]) -> None:
    """Mixtral's router gives a softmax in float32, whose result no cast rounds on its way."""
    made = imported("mixtral")
    _, manifest = variant_of(made.package)
    first = manifest.plan.prefill[0]
    assert isinstance(first, GraphStep)
    graph = onnx.load(made.package / first.graph, load_external_data=False).graph
    maker = {name: node for node in graph.node for name in node.output}
    (top_k,) = (node for node in graph.node if node.op_type == "TopK")
    node, passed = maker[top_k.input[0]], []
    while node.op_type != "Gemm":
        passed.append((node.op_type, [one.i for one in node.attribute if one.name == "to"]))
        node = maker[node.input[0]]
    softmax = [name for name, _ in passed].index("Softmax")
    assert all(to in ([], [TensorProto.FLOAT]) for _, to in passed[: softmax + 2])
    assert passed[softmax + 1] == ("Cast", [TensorProto.FLOAT])


def test_guesses_are_those_of_float32(imported: Callable[[str], Imported]) -> None:
    made = imported("gpt_oss")
    rows = np.random.default_rng(5).normal(size=(32, 1, 32)).astype(np.float32)
    chosen = []
    computes: tuple[ComputeName, ...] = ("f32", "f16")
    for compute in computes:
        with em.load(made.package, compute=compute) as model:
            (guess,) = model.manifest.plan.guesses
            session = model._engine.sessions.get(guess.graph)
            (name,) = guess.inputs
            chosen.append([session.run([guess.ids], {name: row})[0][0, 0] for row in rows])
    # Of 32 choices between 8 experts one may be a near tie.
    assert sum(one == other for one, other in zip(*chosen, strict=True)) >= 31


def test_keys_and_values_are_kept_in_half_precision(imported: Callable[[str], Imported]) -> None:
    made = imported("gpt_oss")
    tokens = list(range(20))
    with em.load(made.package, compute="f16") as model:
        state = model.new_state()
        model.forward({"tokens": tokens[:12]}, state=state)
        saved = state.save()
        assert {one.dtype for name, one in saved.items() if name.startswith("keys")} == {
            np.dtype(np.float16)
        }
        expected = model.forward({"tokens": tokens[12:]}, state=state)["logits"]
        state.restore(saved)
        found = model.forward({"tokens": tokens[12:]}, state=state)["logits"]
        np.testing.assert_array_equal(expected, found)
    with em.load(made.package) as other, pytest.raises(InputError, match="state"):
        other.forward({"tokens": tokens[12:]}, state=state)


def test_a_continued_state_generates_what_transformers_would(
    imported: Callable[[str], Imported],
) -> None:
    """Two chunks of a prompt, then tokens, until the rows of a window are moved to the front."""
    made = imported("gpt_oss")
    bound = tolerance("f16", made.half.own_error)
    prompt = np.random.default_rng(8).integers(3, 96, 80).tolist()
    with em.load(made.package, compute="f16") as model:

        def generated(state: em.State) -> list[int]:
            pieces = model.generate(prompt[45:], max_new_tokens=32, stop_tokens=[], state=state)
            return [piece.token for piece in pieces]

        state, other = model.new_state(), model.new_state()
        model.forward({"tokens": prompt[:45]}, state=state, outputs=[])
        saved = state.save()
        found = generated(state)
        other.restore(saved)
        assert generated(other) == found
        other.restore(saved)
        rest = {"tokens": [*prompt[45:], *found]}
        decoded = model.forward(rest, state=other, steps="decode")["logits"]
    expected = logits_of(made.model, [*prompt, *found])[45:]
    assert typical_error(expected, decoded) <= bound
    rows = expected[len(prompt) - 46 : -1]
    missed = rows.max(axis=1) - rows[np.arange(32), found]
    assert np.median(missed) <= bound * np.abs(expected).max()


def test_a_cpu_refuses_bfloat16(imported: Callable[[str], Imported]) -> None:
    with pytest.raises(DeviceError, match="bf16"):
        em.load(imported("mixtral").package, compute="bf16")


def test_the_commands_run_what_is_asked_for(
    imported: Callable[[str], Imported], capsys: pytest.CaptureFixture[str]
) -> None:
    package = imported("gpt_oss").package
    assert call(capsys, "validate", package, "--deep", "--run", "--compute", "f16")[0] == 0
    assert call(capsys, "validate", package, "--compute", "f16")[0] == 2
    code, _, error = call(capsys, "validate", package, "--run", "--compute", "bf16")
    assert code != 0
    assert "has programs for f32, f16 only" in error
    arguments = ("--tokens", "5,9", "--max-new", "3", "--compute", "f16", "--json")
    code, out, _ = call(capsys, "run", package, *arguments)
    assert (code, json.loads(out)["compute"]) == (0, "f16")


def test_half_precision_needs_weights_in_it(
    imported: Callable[[str], Imported], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--dtype f16"):
        import_checkpoint(
            imported("olmoe").checkpoint, tmp_path / "p", ImportOptions(compute="both")
        )
    with pytest.raises(ConfigError, match="expected f32 or both"):
        import_checkpoint(
            imported("olmoe").checkpoint,
            tmp_path / "p",
            ImportOptions(compute="half"),  # type: ignore[arg-type]
        )
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("compute", "hint"), [("f16", "--dtype bf16"), ("bf16", "--compute f32")])
@pytest.mark.parametrize("error", [0.034, float("inf"), float("nan")])
def test_a_tolerance_has_a_most(compute: Half, hint: str, error: float) -> None:
    assert tolerance(compute, 0.033) == pytest.approx(0.099)
    with pytest.raises(
        UnsupportedError, match=f"transformers itself is off by .* in {compute}"
    ) as e:
        tolerance(compute, error)
    assert hint in str(e.value.hint)


def test_what_half_precision_cannot_compute_is_refused_before_experts_are_written(
    imported: Callable[[str], Imported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = imported("gpt_oss")
    stages: list[str] = []
    monkeypatch.setattr(import_, "typical_error", lambda *_: float("inf"))
    with pytest.raises(UnsupportedError, match=r"off by inf .* in f16"):
        import_checkpoint(
            made.checkpoint, tmp_path / "p", ImportOptions(compute="both"), stage=stages.append
        )
    assert "computing what transformers gives in f16" in stages
    assert "writing experts" not in stages
    assert not list(tmp_path.iterdir())


def test_a_variant_that_computes_something_else_is_found_out(
    imported: Callable[[str], Imported], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_package(imported("gpt_oss").package) as package:
        bound = package.manifest.variants["f16"].tolerance
        variant = package.computing("f16")
        assert not compare_parity(variant, half_tolerance=bound).problems
        experts = {kind.graph for kind in variant.manifest.kinds.values()}
        read = variant.read_file

        def doubled(path: str) -> bytes:
            if path not in experts:
                return read(path)
            model = onnx.ModelProto.FromString(read(path))
            model.graph.node[-1].output[0] = "once"
            model.graph.node.append(helper.make_node("Add", ["once", "once"], ["y"]))
            return model.SerializeToString()

        monkeypatch.setattr(variant, "read_file", doubled)
        (found, *_) = compare_parity(variant, half_tolerance=bound).problems
    assert "expected most tokens within" in found.message


def test_a_node_without_a_kernel_is_between_casts() -> None:
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["values", "ids"]),
        helper.make_node("Mul", ["values", "values"], ["y"]),
    ]
    half = {"x": TensorProto.BFLOAT16, "values": TensorProto.BFLOAT16, "y": TensorProto.BFLOAT16}
    found = fit_for_cuda(nodes, half)
    assert [one.op_type for one in found] == ["Cast", "TopK", "Cast", "Mul"]
    assert found[1].input[1] == "k"
    assert found[2].output == ["values"]
    half = dict.fromkeys(half, TensorProto.FLOAT16)
    assert fit_for_cuda(nodes, half) == nodes


def test_a_fused_norm_of_two_types_is_computed_in_float32() -> None:
    node = helper.make_node(
        "SkipSimplifiedLayerNormalization",
        ["x", "residual", "gamma"],
        ["y", "", "", "sum"],
        domain="com.microsoft",
    )
    half = dict.fromkeys(("x", "residual", "y", "sum"), TensorProto.BFLOAT16)
    found = fit_for_cuda([node], half)
    assert [one.op_type for one in found] == ["Cast", "Cast", node.op_type, "Cast", "Cast"]
    assert list(found[2].input) == ["y.float_0", "y.float_1", "gamma"]
    half["gamma"] = TensorProto.BFLOAT16
    assert fit_for_cuda([node], half) == [node]


def test_a_widened_softmax_is_computed_in_float32() -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["scores"]),
        helper.make_node("Cast", ["scores"], ["wide"], to=TensorProto.FLOAT),
    ]
    found = fit_for_cuda(nodes, {"x": TensorProto.FLOAT16, "scores": TensorProto.FLOAT16})
    assert [one.op_type for one in found] == ["Cast", "Softmax", "Cast"]
    assert found[1].output == ["scores"]
    nodes.append(helper.make_node("Identity", ["scores"], ["again"]))
    half = {"x": TensorProto.FLOAT16, "scores": TensorProto.FLOAT16, "again": TensorProto.FLOAT16}
    assert fit_for_cuda(nodes, half) == nodes


def test_edges_are_float32() -> None:
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["y"], ["z"])]
    half = dict.fromkeys(("x", "y", "z"), TensorProto.FLOAT16)
    found = with_float_edges(nodes, ["x"], ["y", "z"], half)
    kinds = [one.type.tensor_type.elem_type for one in _graph(found, "x", "y", "z").graph.input]
    assert kinds == [TensorProto.FLOAT]
    session = _session(_graph(found, "x", "y", "z").SerializeToString())
    y, z = session.run(None, {"x": np.array([0.5, -3.0], np.float32)})
    np.testing.assert_array_equal(y, [-0.5, 3])
    np.testing.assert_array_equal(z, [0.5, 3])


def _graph(nodes: list[onnx.NodeProto], x: str, *outputs: str) -> onnx.ModelProto:
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "edges",
        [helper.make_tensor_value_info(x, float32, ["n"])],
        [helper.make_tensor_value_info(name, float32, ["n"]) for name in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_an_emulated_graph_rounds_every_value() -> None:
    import ml_dtypes

    kind = TensorProto.BFLOAT16
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(4, 4)).astype(ml_dtypes.bfloat16)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["half"], to=kind),
            helper.make_node("MatMul", ["half", "w"], ["product"]),
            helper.make_node("Sigmoid", ["product"], ["gate"]),
            helper.make_node("Mul", ["product", "gate"], ["hidden"]),
            helper.make_node("Cast", ["hidden"], ["y"], to=TensorProto.FLOAT),
        ],
        "expert",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4]),
            helper.make_tensor_value_info("w", kind, [4, 4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = _session(emulated_graph(model.SerializeToString(), "bf16", set()))
    x = rng.normal(size=(3, 4)).astype(np.float32)
    given = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(weight.view(np.uint16), kind)
    (found,) = session.run_with_ort_values(
        None, {"x": ort.OrtValue.ortvalue_from_numpy(x), "w": given}
    )

    def rounded(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        return result

    product = rounded(rounded(x) @ weight.astype(np.float32))
    expected = rounded(product * rounded(1 / (1 + np.exp(-product))))
    np.testing.assert_allclose(found.numpy(), expected, rtol=2.0**-8)
    np.testing.assert_array_equal(found.numpy(), rounded(found.numpy()))


def _session(data: bytes) -> ort.InferenceSession:
    onnx_runtime.start()
    return ort.InferenceSession(data, onnx_runtime.session_options())


@needs_cuda
def test_cuda_computes_what_transformers_does(half: Imported) -> None:
    compute, _ = variant_of(half.package)
    with open_package(half.package) as package:
        found = compare_variant(package, compute, "cuda")
    assert not found.problems


@needs_cuda
def test_no_float_is_left_to_the_cpu(half: Imported) -> None:
    """But for the first graph: ONNX Runtime computes lengths and positions on the CPU by itself."""
    _, manifest = variant_of(half.package)
    assert manifest.resident is not None
    resident = np.frombuffer((half.package / manifest.resident).read_bytes(), np.uint8).copy()
    first = manifest.plan.prefill[0]
    assert isinstance(first, GraphStep)
    for path in graphs_of(manifest) - {first.graph}:
        options = onnx_runtime.session_options()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_external_initializers_from_files_in_memory(
            ["resident.safetensors"], [resident], [resident.nbytes]
        )
        ort.InferenceSession(
            (half.package / path).read_bytes(), options, providers=["CUDAExecutionProvider"]
        )
