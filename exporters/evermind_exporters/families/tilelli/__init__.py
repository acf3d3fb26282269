"""`tilelli`: ternary blocks of routed pathways, and the Atome byte language model.

Source: specs/tilelli.md; what a package keeps of it stands in docs/tilelli.md.
"""

from __future__ import annotations

from ...family import ModularFamily
from .modules import MODULES
from .params import NAME

FAMILY = ModularFamily(NAME, MODULES)
