"""What a package of a Hugging Face model would weigh, from its `config.json` alone.

No weight is read or downloaded, and nothing of transformers is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from evermind_manifests.dtypes import ITEMSIZE
from evermind_manifests.errors import ConfigError
from evermind_runtime.layers import ExpertLayer
from evermind_runtime.sizes import ModelSizes

from .architecture import Counts, count_parameters
from .fields import Fields
from .json_file import read_object

ExpertDType: TypeAlias = Literal["f16", "bf16", "f32"]

_MOST_BYTES = 4 * 2**20
_ALIGNMENT = 64
# A shard's head and its padding to a page.
_SHARD_PAGE = 4096
# The resident part and the state are float32.
_FLOAT = 4
_DTYPES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0}
# Bytes per weight of the formats checkpoints come in, their scales included.
_MXFP4 = 4.25 / 8
_FP8 = 1 + 4 / 128**2


@dataclass(frozen=True, slots=True)
class ConfigSizes:
    """Sizes of the package a checkpoint would make, and what could not be known.

    `checkpoint_bytes` is about what the checkpoint itself weighs, `None` where its format is
    unknown. `notes` are for people.
    """

    model_type: str
    sizes: ModelSizes
    context: int
    checkpoint_bytes: int | None
    notes: tuple[str, ...]


def read_config(path: Path) -> dict[str, Any]:
    """The object in a `config.json`.

    Raises `LocationError` where there is none, `ConfigError` for what is no JSON object, has
    a key twice or is over 4 MiB.
    """
    return read_object(path, _MOST_BYTES, ConfigError)


def config_sizes(
    config: Mapping[str, Any],
    where: str = "config.json",
    *,
    dtype: ExpertDType = "f16",
    context: int | None = None,
) -> ConfigSizes:
    """Count a model whose experts are stored as `dtype`, for sequences of `context` tokens.

    The context is by default 4,096 tokens, or what the model can take if that is less.
    Raises `ConfigError` for a config that is malformed, not of a Mixture of Experts, or of
    layers this cannot count.
    """
    outer = Fields(config, where)
    fields = outer
    notes = []
    if (inner := outer.within("text_config")) is not None:
        fields = inner
        notes.append("only the text model is counted, not what sees or hears")
    counts = count_parameters(fields)
    kind = fields.text("model_type") or outer.text("model_type") or "unknown"
    if not counts.known:
        notes.append(
            f"model_type {kind!r} is not among those checked: norms and biases may differ "
            "(well under 1 %)"
        )
    longest = fields.count("max_position_embeddings", default=4096, least=1)
    tokens = context or min(4096, longest)
    if tokens > longest:
        raise ConfigError(
            f"{where}: max_position_embeddings: the model takes at most {longest:,} tokens, "
            f"found a context of {tokens:,}"
        )
    if outer.has("quantization_config"):
        notes.append(f"the checkpoint's quantised experts are held as {dtype} in a package")
    return ConfigSizes(
        model_type=kind,
        sizes=_package_sizes(counts, ITEMSIZE[dtype], tokens),
        context=tokens,
        checkpoint_bytes=_checkpoint_bytes(outer, fields, counts),
        notes=tuple(notes),
    )


def _package_sizes(counts: Counts, itemsize: int, context: int) -> ModelSizes:
    layers = []
    for number, layer in enumerate(counts.layers):
        if layer.experts:
            data = sum(size + -size % _ALIGNMENT for size in _times(layer.expert_tensors, itemsize))
            layers.append(
                ExpertLayer(
                    layer=number,
                    experts=layer.experts,
                    top_k=layer.top_k,
                    bytes=data + -data % _SHARD_PAGE,
                )
            )
    routed = sum(layer.top_k * layer.expert for layer in counts.layers)
    state = sum(
        layer.kept_per_token * (min(layer.window, context) if layer.window else context)
        for layer in counts.layers
    )
    return ModelSizes(
        layers=tuple(layers),
        resident_bytes=counts.trunk * _FLOAT,
        active_resident_bytes=(counts.active - routed) * _FLOAT,
        state_bytes=state * _FLOAT,
        total_parameters=counts.trunk + counts.experts,
        active_parameters=counts.active,
        expert_parameters=counts.experts,
        graph_runs=len(layers) + 1,
    )


def _times(counts: tuple[int, ...], itemsize: int) -> list[int]:
    return [count * itemsize for count in counts]


def _checkpoint_bytes(outer: Fields, fields: Fields, counts: Counts) -> int | None:
    """About what the checkpoint weighs: by its dtype, and by how it is quantised."""
    name = fields.text("dtype", "torch_dtype") or outer.text("dtype", "torch_dtype")
    plain = _DTYPES.get(name.removeprefix("torch."))
    quantised = outer.within("quantization_config") or fields.within("quantization_config")
    if quantised is None:
        return None if plain is None else round((counts.trunk + counts.experts) * plain)
    rest = plain or 2.0
    method = quantised.text("quant_method")
    if method == "mxfp4":
        return round(counts.experts * _MXFP4 + counts.trunk * rest)
    # All matrices but the embedding and the head.
    matrices = counts.experts + sum(layer.trunk for layer in counts.layers)
    ends = (counts.embedding + counts.head + counts.norm) * rest
    if method == "fp8":
        return round(matrices * _FP8 + ends)
    if method in ("gptq", "awq") and quantised.has("bits"):
        group = quantised.values.get("group_size")
        scales = 20 / group if isinstance(group, int) and group > 0 else 0.0
        return round(matrices * (quantised.count("bits", least=1) + scales) / 8 + ends)
    return None
