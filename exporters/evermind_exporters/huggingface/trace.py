"""transformers' own model without its experts: loaded, traced to ONNX, and run as a reference.

transformers (5.23) keeps a registry of ways to run experts; one registered here is a single
opaque node of the exported graph, where `cut.py` cuts it. The reference runs transformers' eager
code, with experts read from the checkpoint when they are indexed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from evermind_manifests import dtypes
from evermind_manifests.errors import CheckpointError, MissingExtraError, UnsupportedError
from evermind_manifests.manifest import DType

from .checkpoint import Checkpoint, Rows
from .experts import DOWN, GATE_UP, ExpertRows, ExpertsModule, is_experts

if TYPE_CHECKING:
    import torch

DOMAIN, OPERATOR = "evermind", "Experts"
_CUT = "evermind_cut"
# Lengths of the sample a trace is made with; both vary in the graph.
_PAST, _TOKENS = 5, 3


def require_transformers() -> None:
    """Raise `MissingExtraError` unless what importing needs is installed."""
    for module in ("torch", "transformers", "onnxscript"):
        try:
            __import__(module)
        except ImportError as error:
            raise MissingExtraError(
                error.name or module, "hf", "Importing Hugging Face checkpoints"
            ) from error


def empty_model(folder: Path) -> Any:
    """The model on the meta device: modules and shapes, no weights.

    Raises `UnsupportedError` for a configuration that transformers does not know, or that
    brings code of its own, or whose weights are quantized.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise UnsupportedError(f"{folder}: quantized checkpoints are not carried yet")
        with torch.device("meta"):
            maker: Any = AutoModelForCausalLM
            return maker.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError, OSError) as error:
        if isinstance(error, UnsupportedError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedError(
            f"{folder}: transformers cannot make a causal language model of this: {first}"
        ) from error


def load_trunk(folder: Path, empty: Any) -> Any:
    """The model in float32 with every weight but the experts'.

    Raises `CheckpointError` if the checkpoint lacks a weight.
    """
    import torch

    classes = {type(one) for _, one in empty.named_modules() if is_experts(one)}
    with _without_experts(classes):
        model, info = type(empty).from_pretrained(
            folder,
            config=empty.config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing: {', '.join(missing[:5])}"
        )
    return model.eval()


@contextmanager
def _without_experts(classes: set[type[Any]]) -> Iterator[None]:
    """New instances of `classes` have no parameters, and nothing initialises them."""
    from transformers import PreTrainedModel

    made = {one: one.__init__ for one in classes}
    initialise = PreTrainedModel._initialize_weights

    def bare(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            for name in list(self._parameters):
                del self._parameters[name]

        return init

    def skip(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if type(module) not in classes:
            initialise(self, module, *args, **kwargs)

    try:
        for one, original in made.items():
            setattr(one, "__init__", bare(original))  # noqa: B010
        setattr(PreTrainedModel, "_initialize_weights", skip)  # noqa: B010
        yield
    finally:
        for one, original in made.items():
            setattr(one, "__init__", original)  # noqa: B010
        setattr(PreTrainedModel, "_initialize_weights", initialise)  # noqa: B010


def trace(model: Any, modules: list[ExpertsModule]) -> Any:
    """The ONNX graph (an `onnx_ir.Model`) from `input_ids` `(1, T)` and a growing cache to logits.

    Experts are nodes `evermind.Experts` of (x, ids, gates) with the attribute `layer`. Raises
    `UnsupportedError` where transformers cannot export the model.
    """
    import torch
    from transformers import DynamicCache
    from transformers.exporters import exporter_onnx
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_CUT, _cut)
    for layer, one in enumerate(modules):
        model.get_submodule(one.path).evermind_layer = layer
    cache = DynamicCache(config=model.config)
    with _experts_run_by(model, _CUT), torch.no_grad():
        try:
            # A run that fills a cache tells its shapes, whatever the attention is.
            model(input_ids=torch.arange(_PAST)[None] % 7, past_key_values=cache, use_cache=True)
            tensors = sum(_cache_tensors(layer) for layer in cache.layers)
            vary = torch.export.Dim.AUTO
            inputs = {
                "input_ids": torch.arange(_TOKENS)[None] % 7,
                "position_ids": torch.arange(_PAST, _PAST + _TOKENS)[None],
                "past_key_values": cache,
            }
            shapes = {
                "input_ids": {1: vary},
                "position_ids": {1: vary},
                "past_key_values": [{2: vary} for _ in range(tensors)],
            }
            onnx: Any = exporter_onnx
            config = onnx.OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cpu")
            return onnx.OnnxExporter().export(model, inputs, config=config).program
        except UnsupportedError:
            raise
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(
                f"{type(model).__name__}: transformers cannot export this model to ONNX: "
                f"{type(error).__name__}: {first[:300]}"
            ) from error


def _cache_tensors(layer: Any) -> int:
    if type(layer).__name__ != "DynamicLayer":
        raise UnsupportedError(
            f"state: expected caches that grow with every token, found {type(layer).__name__}",
            hint="Sliding windows and recurrent states are not carried yet.",
        )
    return 2


def _cut(self: Any, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    import torch

    if not torch.compiler.is_exporting():
        return torch.zeros_like(x)  # the run that fills the sample's cache: only shapes matter
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}",
        (x, ids, gates),
        attrs={"layer": self.evermind_layer},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


@contextmanager
def _experts_run_by(model: Any, implementation: str) -> Iterator[None]:
    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class Reference:
    """transformers' eager model over the trunk, experts as the package stores them."""

    def __init__(
        self,
        model: Any,
        modules: list[ExpertsModule],
        layers: list[list[ExpertRows]],
        checkpoint: Checkpoint,
        dtype: DType,
    ) -> None:
        self._model = model
        for module, experts in zip(modules, layers, strict=True):
            one = model.get_submodule(module.path)
            gate_up = [(rows.gate, rows.up) for rows in experts]
            down = [(rows.down,) for rows in experts]
            setattr(one, GATE_UP, _Stack(gate_up, checkpoint, dtype))
            setattr(one, DOWN, _Stack(down, checkpoint, dtype))

    def logits(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """`(T, vocabulary)` for `tokens` `(T,)`."""
        import torch

        with _experts_run_by(self._model, "eager"), torch.no_grad():
            result = self._model(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
        found: npt.NDArray[np.float32] = result.logits[0].float().numpy()
        return found


class _Stack:
    """Stands in for a parameter `(experts, …)`: one expert is read when it is indexed."""

    def __init__(
        self, experts: Sequence[tuple[Rows, ...]], checkpoint: Checkpoint, dtype: DType
    ) -> None:
        self._experts = experts
        self._checkpoint = checkpoint
        self._dtype = dtype

    def __getitem__(self, expert: Any) -> torch.Tensor:
        import torch

        parts = [
            as_float(stored(self._checkpoint, rows, self._dtype), self._dtype)
            for rows in self._experts[int(expert)]
        ]
        return torch.from_numpy(np.concatenate(parts))


def stored(checkpoint: Checkpoint, rows: Rows, dtype: DType) -> npt.NDArray[Any]:
    """The rows in `dtype`: untouched if the checkpoint has them in it, else rounded to it."""
    array, found = checkpoint.read(rows), checkpoint.dtype(rows.name)
    if found == dtype:
        return array
    return dtypes.encode(as_float(array, found), dtype)


def as_float(array: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.float32]:
    """Stored values as float32."""
    result: npt.NDArray[np.float32] = dtypes.decode(
        np.ascontiguousarray(array).reshape(-1).view(np.uint8), dtype, array.shape
    )
    return result
