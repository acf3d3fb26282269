"""Half-precision matrices cast block by block give what a whole cast gives."""

import numpy as np
import pytest
from evermind_exporters.families.linear import Weight, block_rows, linear
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_runtime import onnx_runtime
from hypothesis import given
from hypothesis import strategies as st

SIZE = st.integers(1, 5000)


@given(SIZE, SIZE)
def test_blocks_are_alike_and_bounded(out: int, width: int) -> None:
    rows = block_rows(out, width)
    assert 1 <= rows <= out
    assert out % rows == 0
    assert rows == out or rows * width <= 512 * 1024


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shape", [(1536, 1024), (1021, 1024), (8, 64)])
def test_blocks_equal_one_product(shape: tuple[int, int], tokens: int, with_bias: bool) -> None:
    b = GraphBuilder("layer")
    x = b.input("x", "f32", ["tokens", shape[1]])
    weight = Weight(b.input("w", "f16", shape), "f16", shape)
    bias = None
    if with_bias:
        bias = Weight(b.input("b", "f16", shape[:1]), "f16", shape[:1])
    b.output(linear(b, x, weight, bias), "y", "f32", ["tokens", shape[0]])
    onnx_runtime.start()
    session = onnx_runtime.require().InferenceSession(b.build(), onnx_runtime.session_options())
    rng = np.random.default_rng(0)
    values = {
        "x": rng.normal(size=(tokens, shape[1])).astype(np.float32),
        "w": (rng.normal(size=shape) / 32).astype(np.float16),
    }
    expected = values["x"].astype(np.float64) @ values["w"].astype(np.float64).T
    if with_bias:
        values["b"] = rng.normal(size=shape[0]).astype(np.float16)
        expected += values["b"]
    (y,) = session.run(None, values)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
