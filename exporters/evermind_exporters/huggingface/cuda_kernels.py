"""Which operators ONNX Runtime's CUDA provider runs in half precision.

From the kernels that ONNX Runtime 1.31.1 registers (`get_all_opkernel_def`), for opsets 20 to 23
and version 1 of `com.microsoft`. What stands in neither set is computed in float32, between casts.
"""

from __future__ import annotations

from typing import Final

from evermind_manifests.manifest import Half

_EITHER = """
    Abs Add Cast Compress Concat ConstantOfShape Div Erf Exp Expand Flatten Gather GatherElements
    GatherND Gelu Gemm Identity If IsInf IsNaN LayerNormalization MatMul Max Min Mul Neg Pow
    ReduceMean ReduceSum Relu Reshape Scan ScatterElements ScatterND Shape Sigmoid Sign
    SimplifiedLayerNormalization Size Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Tile Transpose
    Trilu Unsqueeze Where
    com.microsoft.BiasGelu com.microsoft.FastGelu com.microsoft.FusedMatMul com.microsoft.Gelu
    com.microsoft.GroupQueryAttention com.microsoft.QuickGelu com.microsoft.RotaryEmbedding
    com.microsoft.SkipLayerNormalization com.microsoft.SkipSimplifiedLayerNormalization
"""
_FLOAT16 = """
    ArgMax ArgMin Ceil Clip Conv Cos CumSum Einsum Elu Equal Floor Greater GreaterOrEqual
    HardSigmoid HardSwish LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization NonZero OneHot
    Pad Reciprocal ReduceL2 ReduceMax ReduceMin ReduceProd ReduceSumSquare Round Selu Sin Softplus
    Softsign TopK
"""
#: By dtype, operators of the standard domain by their names, others with their domain.
KERNELS: Final[dict[Half, frozenset[str]]] = {
    "f16": frozenset((_EITHER + _FLOAT16).split()),
    "bf16": frozenset(_EITHER.split()),
}
