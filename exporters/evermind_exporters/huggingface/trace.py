"""transformers' own model: its modules and shapes, and its graph in ONNX, without its weights."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from evermind_manifests.errors import MissingExtraError, UnsupportedError
from evermind_manifests.manifest import Half, StateSpec

from ..reason import reason
from . import attention
from .checkpoint import read_json
from .experts import ExpertsModule
from .fixes import fixes
from .half import TORCH_DTYPES
from .misfits import CONFIG_NAME
from .opaque import opaque_experts
from .quantized import QUANTIZATION
from .recurrent import RECURRENT_CACHES, scanned_recurrences
from .states import buffer_spec, cache_spec, counter

if TYPE_CHECKING:
    import torch

# Modules are made for each layer; positions are counted in the manifest.
_MOST = {
    "num_hidden_layers": 4096,
    "n_layers": 4096,
    "n_layer": 4096,
    "max_position_embeddings": 2**31 - 1,
}
# Lengths of the sample a trace is made with; both vary in the graph.
_PAST, _TOKENS = 5, 3


class Seen(NamedTuple):
    """For each layer with experts how many a token chooses; and the states of the plan."""

    top_k: tuple[int, ...]
    states: tuple[StateSpec, ...]


def require_transformers() -> None:
    """Raise `MissingExtraError` unless what importing needs is installed."""
    for module in ("torch", "transformers", "onnxscript"):
        try:
            __import__(module)
        except ImportError as error:
            raise MissingExtraError(
                error.name or module, "hf", "Importing Hugging Face checkpoints"
            ) from error


def empty_model(folder: Path, compute: Literal["f32"] | Half = "f32") -> Any:
    """The model on the meta device: modules and shapes, no weights.

    `folder` has a config.json, or is one. Its parameters are of the dtype that transformers
    computes `compute` with: it keeps some in float32.

    Raises `UnsupportedError` for a configuration that transformers does not know, or that
    brings code of its own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, QUANTIZATION, None):  # its numbers are dequantised as they are read
            delattr(config, QUANTIZATION)
        with torch.device("meta"):
            maker: Any = AutoModelForCausalLM
            dtype = TORCH_DTYPES[compute]
            model = maker.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except (UnsupportedError, MissingExtraError):
        raise
    except Exception as error:  # a configuration may be wrong in any way
        raise UnsupportedError(
            f"{folder}: transformers cannot make a causal language model of this: {reason(error)}"
        ) from error
    _keep_in_float(model, getattr(torch, dtype))
    return model


def _check_config(folder: Path) -> None:
    """Raise `UnsupportedError` for what would run code, or make a model without end."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / CONFIG_NAME if folder.is_dir() else folder
    said = read_json(path)
    kind = said.get("model_type")
    if said.get("auto_map") and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise UnsupportedError(
            f"{path}: model_type {kind!r:.80}: transformers "
            f"{metadata.version('transformers')} does not know it, and the checkpoint brings code "
            "of its own (auto_map), which is never run",
            hint="Models that transformers itself can make are imported.",
        )
    nested = said.get("text_config")
    for fields in (said, nested if isinstance(nested, dict) else {}):
        for name, most in _MOST.items():
            value = fields.get(name)
            if isinstance(value, int) and value > most:
                raise UnsupportedError(f"{path}: {name}: expected at most {most:,}, found {value}")


def _keep_in_float(model: Any, dtype: torch.dtype) -> None:
    """As transformers does when it loads weights in `dtype`."""
    import torch
    from transformers.core_model_loading import build_glob_alternation

    kept = model._get_dtype_plan(dtype)
    if not kept:
        return
    pattern = build_glob_alternation(list(kept))[0]
    for name, one in (*model.named_parameters(), *model.named_buffers()):
        if one.dtype == dtype and pattern.search(name):
            one.data = one.data.to(torch.float32)


def trace(
    model: Any, modules: list[ExpertsModule], weights: Container[str], *, cuda: bool = False
) -> Any:
    """The ONNX graph (an `onnx_ir.Model`) from `input_ids` `(1, T)` and a growing cache to logits.

    The parameters named in `weights` are inputs of the graph, so that nothing is computed from
    their values while it is made. Experts are nodes `evermind.Experts` of (x, ids, gates) with the
    attribute `layer`. With `cuda`, its states are such that a graph for CUDA has the same: that
    one's GroupQueryAttention (ONNX Runtime 1.31) takes no bias, so no attention in chunks.
    Raises `UnsupportedError` where transformers cannot export the model.
    """
    import torch
    from transformers import DynamicCache
    from transformers.exporters import exporter_onnx

    tokens = _sample()
    cache = DynamicCache(config=model.config)
    with opaque_experts(model, modules), fixes(model), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(_as_inputs(weights))
        try:
            plain = _fill(cache, model, chunks=not cuda)
            if plain:
                stack.enter_context(attention.attention_nodes(model, plain))
            varying = [axis for layer in cache.layers for _, axis in _cache_tensors(layer)]
            vary = torch.export.Dim.AUTO
            shapes = {
                "input_ids": {1: vary},
                "position_ids": {1: vary},
                "past_key_values": [{} if axis is None else {axis: vary} for axis in varying],
            }
            onnx: Any = exporter_onnx
            # Attention with a mask is fused to an operator that takes none on CUDA.
            fusions = "cpu" if plain or model.dtype == torch.float32 else None
            config = onnx.OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions=fusions)
            inputs = {**tokens, "past_key_values": cache}
            with scanned_recurrences(model):
                return onnx.OnnxExporter().export(model, inputs, config=config).program
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(
                f"{type(model).__name__}: transformers cannot export this model to ONNX: "
                f"{type(error).__name__}: {reason(error)}"
            ) from error


def look(model: Any, modules: list[ExpertsModule], longest: int | None) -> Seen:
    """What `trace` would find of experts and states, by running the model and no export.

    `longest` is the longest context. Raises `UnsupportedError` for a model that transformers
    cannot run so, or that keeps something else than is carried.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with opaque_experts(model, modules) as chosen, fixes(model), torch.no_grad():
        try:
            plain = _fill(cache, model) or {}
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(
                f"{type(model).__name__}: transformers cannot run this model without its weights: "
                f"{type(error).__name__}: {reason(error)}"
            ) from error
    buffers = [
        buffer_spec(one.heads, one.width, one.sight.window, longest) for one in plain.values()
    ]
    states = [*buffers, *buffers]  # keys and values
    for layer in cache.layers:
        if not hasattr(layer, attention.LENGTH):
            states += [
                cache_spec(tuple(tensor.shape), axis is not None, longest)
                for tensor, axis in _cache_tensors(layer)
            ]
    states += counter(states, longest).values()
    if len(chosen) != len(modules):
        raise UnsupportedError(
            f"{type(model).__name__}: expected {len(modules)} layers that choose experts, found "
            f"{len(chosen)}"
        )
    return Seen(tuple(chosen[number] for number in range(len(modules))), tuple(states))


def _sample() -> dict[str, Any]:
    import torch

    return {
        "input_ids": torch.arange(_TOKENS)[None] % 7,
        "position_ids": torch.arange(_PAST, _PAST + _TOKENS)[None],
    }


def _fill(cache: Any, model: Any, *, chunks: bool = True) -> dict[int, attention.Plain] | None:
    """Run the model on an empty `cache`, which then has its shapes, whatever attention it is.

    Gives the layers whose attention is plain, if all is; their caches keep lengths alone.
    """
    import torch

    attention.keep_all(cache)
    plain = attention.survey(model, _sample(), chunks=chunks)
    model(input_ids=torch.arange(_PAST)[None] % 7, past_key_values=cache, use_cache=True)
    if plain:
        attention.keep_lengths(cache, _PAST)
    return plain


def _cache_tensors(layer: Any) -> list[tuple[Any, int | None]]:
    """The tensors of a layer's cache, and for each the axis along which it grows."""
    import torch
    from torch.utils._pytree import tree_leaves

    kind = type(layer).__name__
    if kind not in ("DynamicLayer", "LengthLayer", *RECURRENT_CACHES):
        raise UnsupportedError(
            f"state: expected caches that grow with every token, or of fixed shape, found {kind}"
        )
    grow = [getattr(layer, name, None) for name in ("keys", "values", attention.LENGTH)]
    tensors = [one for one in tree_leaves(list(vars(layer).values())) if torch.is_tensor(one)]
    return [(one, 2 if any(one is other for other in grow) else None) for one in tensors]


@contextmanager
def _as_inputs(weights: Container[str]) -> Iterator[None]:
    """While a model is exported: `weights` become graph inputs before anything is optimised.

    An optimiser would transpose and concatenate constants, which takes their memory several
    times over and leaves no trace of which weight is which.
    """
    from onnxscript import optimizer

    original = optimizer.optimize_ir

    def optimise(model: Any, *args: Any, **kwargs: Any) -> Any:
        graph = model.graph
        for name in [name for name in graph.initializers if name in weights]:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
        return original(model, *args, **kwargs)

    setattr(optimizer, "optimize_ir", optimise)  # noqa: B010
    try:
        yield
    finally:
        setattr(optimizer, "optimize_ir", original)  # noqa: B010
