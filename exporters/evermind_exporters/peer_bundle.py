"""The peer's Hugging Face bundle: a folder with a language model and its config.json.

Source: specs/evermind-formats.md, section 13. Read: all dimensions but top-k are inferred from
the tensors and checked against what config.json says. Top-k cannot be inferred; the peer
assumes 2 where it is not given, we refuse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from evermind_manifests.errors import CheckpointError, ConfigError

from .checkpoints import validate_config

MODEL_TYPE: Final = "evermind"
_TOP_K = "num_experts_per_tok"
# config.json's keys for our dimensions; `hidden_size` repeats `d_model`.
_KEYS: Final = {
    "vocab_size": "vocabSize",
    "d_model": "dModel",
    "hidden_size": "dModel",
    "num_hidden_layers": "numLayers",
    "conv_kernel": "convKernel",
    "intermediate_size": "hiddenDim",
    "num_experts": "numExperts",
}
_INDEX = re.compile(r"layers\.(\d{1,9})\.(?:moe\.experts\.(\d{1,9})\.)?")


def bundle_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """The bundle's config.json and generation_config.json, byte for byte as the peer has them."""
    described = {
        "model_type": MODEL_TYPE,
        "architectures": ["EvermindForCausalLM"],
        **{key: config[name] for key, name in _KEYS.items()},
        _TOP_K: config["topK"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        # The peer says so for half weights too.
        "torch_dtype": "float32",
        "transformers_version": "4.0.0",
    }
    generation = {"do_sample": False, "temperature": 1, "max_new_tokens": 64}
    # JavaScript prints 1e-5 in full.
    text = json.dumps(described, indent=2).replace("1e-05", "0.00001")
    return {
        "config.json": text.encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }


def bundle_config(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """The model's configuration from config.json and the shapes of all its tensors.

    Raises `CheckpointError` where a tensor that tells a dimension is missing, where the two
    disagree, or where top-k is not given.
    """
    vocab, width = _dims(shapes, "token_embedding.weight", 2, where)
    _, kernel = _dims(shapes, "layers.0.conv.weight", 2, where)
    hidden, _ = _dims(shapes, "layers.0.moe.shared.w1", 2, where)
    layers = experts = 0
    for name in shapes:
        if match := _INDEX.match(name):
            layers = max(layers, int(match[1]) + 1)
            experts = max(experts, int(match[2] or -1) + 1)
    dims = {
        "vocabSize": vocab,
        "dModel": width,
        "numLayers": layers,
        "convKernel": kernel,
        "hiddenDim": hidden,
        "numExperts": experts,
    }
    for key, name in _KEYS.items():
        if config.get(key, dims[name]) != dims[name]:
            raise CheckpointError(
                f"{where}: {key}: expected {dims[name]} (the tensors), found {config[key]!r}"
            )
    if _TOP_K not in config:
        raise CheckpointError(
            f"{where}: {_TOP_K}: not given, and the tensors do not tell it",
            hint=f"Add it: the model was trained with a top-k (`topK`) of {experts} or less.",
        )
    try:
        return validate_config("evermind-lm", dims | {"topK": config[_TOP_K]})
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error.message}") from error


def _dims(
    shapes: Mapping[str, tuple[int, ...]], name: str, rank: int, where: str
) -> tuple[int, ...]:
    if name not in shapes or len(shapes[name]) != rank:
        found = shapes.get(name, "none")
        raise CheckpointError(
            f"{where}: {name}: expected a tensor of rank {rank} in the weights, found {found}"
        )
    return shapes[name]
