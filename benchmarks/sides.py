"""Other ways to decode an `evermind-lm`: plain numpy, C, and one ONNX graph of all experts.

Each takes the model's tensors and has `decode(tokens) -> logits` (count, V), from an empty
state, one token at a time with the state carried on. They share no code with the runtime.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from evermind_exporters.checkpoints import canonical_shapes
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_runtime import onnx_runtime

Array: TypeAlias = np.ndarray
Config: TypeAlias = Mapping[str, Any]

_DIMS = ("vocabSize", "dModel", "numLayers", "convKernel", "hiddenDim", "numExperts", "topK")
_EPSILON = np.float32(1e-5)


class NumpyModel:
    """float32 throughout; the convolution's window is the only state."""

    def __init__(self, config: Config, tensors: Mapping[str, Array]) -> None:
        self._config = config
        self._embedding = tensors["token_embedding.weight"]
        self._layers = [
            {name.removeprefix(prefix): array for name, array in tensors.items() if prefix in name}
            for prefix in (f"layers.{layer}." for layer in range(config["numLayers"]))
        ]
        # Tap j is the lag; the window is oldest first.
        self._taps = [layer["conv.weight"][:, ::-1].T.copy() for layer in self._layers]

    def decode(self, tokens: Sequence[int]) -> Array:
        past = [np.zeros_like(taps[1:]) for taps in self._taps]
        return np.stack([self._step(token, past) for token in tokens])

    def _step(self, token: int, past: list[Array]) -> Array:
        x = self._embedding[token]
        for at, layer in enumerate(self._layers):
            window = np.vstack((past[at], _rms_norm(x, layer["norm_conv.weight"])))
            past[at] = window[1:]
            x = x + (window * self._taps[at]).sum(0)
            n = _rms_norm(x, layer["norm_moe.weight"])
            scores = layer["moe.router.weight"] @ n
            ids = np.argsort(-scores, kind="stable")[: self._config["topK"]]
            gates = np.exp(scores[ids] - scores[ids[0]])
            x = x + _ffn(layer, "moe.shared.", n)
            for expert, gate in zip(ids.tolist(), gates / gates.sum(), strict=True):
                x = x + gate * _ffn(layer, f"moe.experts.{expert}.", n)
        return self._embedding @ x


def compile_bound(folder: Path) -> Path:
    """`c_bound.c` as a library in `folder`, compiled for this processor."""
    source, library = Path(__file__).with_name("c_bound.c"), folder / "c_bound.so"
    command = ["cc", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC", "-lm"]
    subprocess.run([*command, str(source), "-lm", "-o", str(library)], check=True)
    return library


class CompiledModel:
    """The library that `compile_bound` made; one thread."""

    def __init__(self, config: Config, tensors: Mapping[str, Array], library: Path) -> None:
        self._function = ctypes.CDLL(str(library)).decode
        self._function.restype = ctypes.c_long
        names = canonical_shapes("evermind-lm", config)
        self._tensors = [np.ascontiguousarray(tensors[name]) for name in names]
        self._weights = (ctypes.c_void_p * len(names))(*(one.ctypes.data for one in self._tensors))
        self._dims = (ctypes.c_int * len(_DIMS))(*(config[name] for name in _DIMS))
        self._vocab = config["vocabSize"]

    def decode(self, tokens: Sequence[int], *, keep: bool = True) -> Array:
        """With `keep` false the logits are computed and thrown away; the result is empty."""
        ids = np.asarray(tokens, dtype=np.int32)
        logits = np.empty((len(ids) if keep else 0, self._vocab), dtype=np.float32)
        out = ctypes.c_void_p(logits.ctypes.data if keep else None)
        self._function(self._weights, self._dims, ctypes.c_void_p(ids.ctypes.data), len(ids), out)
        return logits


class DenseGraph:
    """One session that computes every expert of every layer and masks what was not chosen.

    What exporting such a model by tracing gives; the state is carried through the graph.
    """

    def __init__(
        self, config: Config, model: bytes | Path, threads: int, *, packed: bool = True
    ) -> None:
        """`model` is `dense_model`'s, or a file of it; `packed` lets ONNX Runtime repack weights.

        What is repacked is a copy. Otherwise weights in a file beside the model's are mapped.
        """
        onnx_runtime.start(threads)
        options = onnx_runtime.session_options()
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self._session = ort.InferenceSession(model, options)
        shape = (config["convKernel"] - 1, config["dModel"])
        self._state = {
            f"conv.{at}": np.zeros(shape, np.float32) for at in range(config["numLayers"])
        }

    def decode(self, tokens: Sequence[int]) -> Array:
        state, rows = self._state, []
        for token in tokens:
            logits, *after = self._session.run(
                None, {"tokens": np.array([token], dtype=np.int64), **state}
            )
            state = dict(zip(state, after, strict=True))
            rows.append(logits[0])
        return np.stack(rows)


def _rms_norm(x: Array, gain: Array) -> Array:
    return x / np.sqrt(np.mean(x * x) + _EPSILON) * gain


def _ffn(layer: Mapping[str, Array], prefix: str, n: Array) -> Array:
    up = np.maximum(layer[prefix + "w1"] @ n + layer[prefix + "b1"], 0)
    return layer[prefix + "w2"] @ up + layer[prefix + "b2"]


def dense_model(config: Config, tensors: Mapping[str, Array]) -> onnx.ModelProto:
    """The graph that `DenseGraph` runs, with its weights."""
    b = GraphBuilder("dense")
    width, experts = config["dModel"], config["numExperts"]
    window = config["convKernel"] - 1

    weights: dict[str, Array] = {}

    def weight(array: Array) -> str:
        name = f"weight.{len(weights)}"
        weights[name] = np.ascontiguousarray(array, dtype=np.float32)
        return b.input(name, "f32", weights[name].shape)

    embedding = weight(tensors["token_embedding.weight"])
    x = b.op("Gather", embedding, b.input("tokens", "i64", [1]), axis=0)
    states = []
    for at in range(config["numLayers"]):
        prefix = f"layers.{at}."
        n = _norm_op(b, x, weight(tensors[f"{prefix}norm_conv.weight"]))
        past = b.op("Concat", b.input(f"conv.{at}", "f32", [window, width]), n, axis=0)
        states.append(b.op("Slice", past, b.const([1]), b.const([window + 1]), b.const([0])))
        taps = weight(tensors[f"{prefix}conv.weight"][:, ::-1].T)
        x = b.op("Add", x, b.op("ReduceSum", b.op("Mul", past, taps), b.const([0]), keepdims=1))
        n = _norm_op(b, x, weight(tensors[f"{prefix}norm_moe.weight"]))
        ffn = {
            name: np.stack([tensors[f"{prefix}moe.experts.{e}.{name}"] for e in range(experts)])
            for name in ("w1", "b1", "w2", "b2")
        }
        scores = b.op("Gemm", n, weight(tensors[f"{prefix}moe.router.weight"]), transB=1)
        top, ids = b.op("TopK", scores, b.const([config["topK"]]), outputs=2)
        gates = b.op("ScatterElements", weight(np.zeros((1, experts))), ids,
                     b.op("Softmax", top, axis=-1), axis=1)  # fmt: skip
        # (1, d) x (E, d, h) -> (E, 1, h) -> (E, 1, d): every expert, weighed by its gate or 0.
        up = b.op("Add", b.op("MatMul", n, weight(ffn["w1"].transpose(0, 2, 1))),
                  weight(ffn["b1"][:, None]))  # fmt: skip
        down = b.op("Add", b.op("MatMul", b.op("Relu", up), weight(ffn["w2"].transpose(0, 2, 1))),
                    weight(ffn["b2"][:, None]))  # fmt: skip
        column = b.op("Reshape", gates, b.const([experts, 1, 1]))
        mixed = b.op("ReduceSum", b.op("Mul", down, column), b.const([0]), keepdims=0)
        shared = n
        for number in "12":
            name = f"{prefix}moe.shared."
            shared = b.op("Gemm", shared, weight(tensors[f"{name}w{number}"]),
                          weight(tensors[f"{name}b{number}"]), transB=1)  # fmt: skip
            shared = b.op("Relu", shared) if number == "1" else shared
        x = b.op("Add", b.op("Add", x, shared), mixed)
    b.output(b.op("Gemm", x, embedding, transB=1), "logits", "f32", [1, config["vocabSize"]])
    for at, value in enumerate(states):
        b.output(value, f"conv_out.{at}", "f32", [window, width])
    model = onnx.load_model_from_string(b.build())
    fed = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(fed)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return model


def _norm_op(b: GraphBuilder, x: str, gain: str) -> str:
    return str(b.op("RMSNormalization", x, gain, axis=-1, epsilon=float(_EPSILON)))
