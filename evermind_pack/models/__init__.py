"""The Evermind model families in torch, one module each, with the peer's initial weights.

Source of every formula and shape: specs/evermind-formats.md. All models run in float32 and,
after `.double()`, in float64.
"""

from __future__ import annotations

from evermind_exporters.checkpoints import Family

from .base import FamilyModel
from .evermind_lm import EvermindLM, LmOutput
from .generate import generate
from .initial import initial_tensors
from .limbic import LimbicModel, LimbicOutput
from .moe_layer import MoeOutput, Routes
from .reference import reference
from .shared_expert_moe import SharedExpertMoE

__all__ = [
    "MODELS",
    "EvermindLM",
    "FamilyModel",
    "LimbicModel",
    "LimbicOutput",
    "LmOutput",
    "MoeOutput",
    "Routes",
    "SharedExpertMoE",
    "generate",
    "initial_tensors",
    "reference",
]

MODELS: dict[Family, type[FamilyModel]] = {
    model.family: model for model in (SharedExpertMoE, EvermindLM, LimbicModel)
}
