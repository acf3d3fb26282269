"""The model families that can be packaged, by the name in `manifest.family`."""

from __future__ import annotations

from ..family import ModelFamily
from . import evermind_lm, limbic, shared_expert_moe, synapse, tilelli, tokitai

FAMILIES: dict[str, ModelFamily] = {
    module.FAMILY.name: module.FAMILY
    for module in (shared_expert_moe, evermind_lm, limbic, synapse, tokitai, tilelli)
}
