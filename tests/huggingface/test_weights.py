"""Half-precision weights in a graph compute what their float32 values do, block by block or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from evermind_exporters.huggingface.weights import weigh
from evermind_exporters.resident import Stored, TensorFile
from evermind_manifests.dtypes import decode, encode
from evermind_manifests.manifest import DType
from evermind_runtime import onnx_runtime
from onnx import TensorProto, helper

WIDTH = 64
# A divisor of use, none (a prime), one row too many for a block, and too few values to be cut.
ROWS = (16384, 8209, 8193, 640)


def linear(rows: int, bias: bool) -> list[Any]:
    if bias:
        return [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    return [helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transB=1)]


def run(
    nodes: list[Any], weights: dict[str, npt.NDArray[np.float32]], dtype: DType, **inputs: Any
) -> tuple[npt.NDArray[np.float32], list[Any]]:
    """What the nodes give over `weights` as they are stored, and the nodes that were run."""
    stored = {name: encode(one, dtype) for name, one in weights.items()}
    file = TensorFile({name: Stored(dtype, one.shape) for name, one in weights.items()})
    data = np.frombuffer(
        b"".join(file.parts(lambda name: iter([stored[name].tobytes()]))), np.uint8
    )
    weighed, initializers = weigh(nodes, file.index)
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    graph = helper.make_graph(
        weighed,
        "g",
        [
            helper.make_tensor_value_info(name, kinds[one.dtype], one.shape)
            for name, one in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    ort = onnx_runtime.require()
    onnx_runtime.start(None)
    options = onnx_runtime.session_options()
    location = next(iter(file.index.values())).location
    options.add_external_initializers_from_files_in_memory([location], [data], [data.nbytes])
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0], weighed


def values(array: npt.NDArray[np.float32], dtype: DType) -> npt.NDArray[np.float32]:
    return decode(encode(array, dtype), dtype, array.shape)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(dtype: DType, rows: int, bias: bool) -> None:
    rng = np.random.default_rng(rows)
    weights = {"w": rng.normal(size=(rows, WIDTH)).astype(np.float32)}
    if bias:
        weights["b"] = rng.normal(size=rows).astype(np.float32)
    # Gemm takes rows, a product also a stack of them.
    x = rng.normal(size=(3, WIDTH) if bias else (1, 3, WIDTH)).astype(np.float32)
    found, nodes = run(linear(rows, bias), weights, dtype, x=x)
    expected = x @ values(weights["w"], dtype).T
    if bias:
        expected = expected + values(weights["b"], dtype)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.shape == expected.shape
    cut = any(node.op_type == "Scan" for node in nodes)
    assert cut == (dtype != "f32" and rows * WIDTH >= 512 * 1024)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_embeddings_and_other_uses_of_one_weight(dtype: DType) -> None:
    table = np.random.default_rng(1).normal(size=(9000, WIDTH)).astype(np.float32)
    scale = np.linspace(0.5, 2, WIDTH, dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["rows"]),
        helper.make_node("Mul", ["rows", "scale"], ["x"]),
        helper.make_node("FusedMatMul", ["x", "w"], ["z"], domain="com.microsoft", transB=1),
        helper.make_node("Mul", ["z", "z"], ["y"]),
    ]
    ids = np.array([5, 8999, 0])
    found, _ = run(nodes, {"w": table, "scale": scale}, dtype, ids=ids)
    whole = values(table, dtype)
    expected = (whole[ids] * values(scale, dtype)) @ whole.T
    np.testing.assert_allclose(found, expected**2, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, alpha=0.5),
        helper.make_node("Gemm", ["x", "v"], ["y"]),
    ],
)
def test_a_product_of_another_form_is_cast_whole(node: Any) -> None:
    rng = np.random.default_rng(2)
    shape = (8192, WIDTH) if "w" in node.input else (WIDTH, 8192)
    weights = {node.input[1]: rng.normal(size=shape).astype(np.float32)}
    x = rng.normal(size=(2, WIDTH)).astype(np.float32)
    found, nodes = run([node], weights, "f16", x=x)
    whole = values(weights[node.input[1]], "f16")
    expected = 0.5 * x @ whole.T if "w" in node.input else x @ whole
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not any(one.op_type == "Scan" for one in nodes)
