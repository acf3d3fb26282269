"""The Synapse modules in torch; names and shapes are the published state dict's.

All run in float32 and, after `.double()`, in float64. Each takes the state of its sequences
and returns the next one; without a state a sequence starts anew.
"""

from __future__ import annotations

from .experts import Expert, ExpertPool
from .fast_weights import FastWeights
from .mamba import Mamba, MambaState
from .model import Layer, LayerState, RmsNorm, SynapseModel
from .modules import MODULES, SynapseModule
from .thalamus import Thalamus
from .xlstm import Xlstm, XlstmState

__all__ = [
    "MODULES",
    "Expert",
    "ExpertPool",
    "FastWeights",
    "Layer",
    "LayerState",
    "Mamba",
    "MambaState",
    "RmsNorm",
    "SynapseModel",
    "SynapseModule",
    "Thalamus",
    "Xlstm",
    "XlstmState",
]
