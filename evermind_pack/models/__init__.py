"""The model families in torch, one file each.

Source of every formula and shape: specs/evermind-formats.md. All models run in float32 and,
after `.double()`, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import FamilyModel, LanguageModel
from .evermind_lm import EvermindLM, LmOutput
from .generate import generate
from .initial import initial_tensors
from .limbic import LimbicModel, LimbicOutput
from .moe_layer import MoeOutput, Routes
from .reference import reference
from .shared_expert_moe import SharedExpertMoE
from .synapse import MODULES as SYNAPSE_MODULES
from .synapse import SynapseModel
from .tilelli import AtomeLmModel, TilelliBlockModel
from .tokitai import TokitaiMoE, TokitaiOutput

__all__ = [
    "MODELS",
    "AtomeLmModel",
    "EvermindLM",
    "FamilyModel",
    "LanguageModel",
    "LimbicModel",
    "LimbicOutput",
    "LmOutput",
    "MoeOutput",
    "Routes",
    "SharedExpertMoE",
    "SynapseModel",
    "TilelliBlockModel",
    "TokitaiMoE",
    "TokitaiOutput",
    "generate",
    "initial_tensors",
    "model_type",
    "reference",
]

# Per family its model, or, where modules pack on their own, one model per module.
MODELS: dict[str, type[FamilyModel] | Mapping[str, type[FamilyModel]]] = {
    model.family: model for model in (SharedExpertMoE, EvermindLM, LimbicModel, TokitaiMoE)
}
MODELS["synapse"] = {"model": SynapseModel} | {one.module: one for one in SYNAPSE_MODULES}
MODELS["tilelli"] = {"block": TilelliBlockModel, "lm": AtomeLmModel}


def model_type(family: str, config: Mapping[str, Any]) -> type[FamilyModel]:
    """The class whose model a resolved `config` of `family` describes."""
    found = MODELS[family]
    return found if isinstance(found, type) else found[config["module"]]
