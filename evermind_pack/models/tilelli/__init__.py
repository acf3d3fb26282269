"""The Tilelli block and the Atome language model in torch, with the reference's names.

Quantised where weights are used, trained straight through. Source: specs/tilelli.md.
"""

from __future__ import annotations

from .block import PathwayRoutes, TilelliBlockModel, bank_penalty
from .lm import AtomeLmModel, AtomeOutput
from .ternary import ternarise

__all__ = [
    "AtomeLmModel",
    "AtomeOutput",
    "PathwayRoutes",
    "TilelliBlockModel",
    "bank_penalty",
    "ternarise",
]
