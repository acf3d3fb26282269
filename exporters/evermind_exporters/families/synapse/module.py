"""What all Synapse modules share: `params.py` lists their configurations and tensors."""

from __future__ import annotations

from typing import Any

from ...family import Config, ModelFamily, Shape, Shapes
from . import params


class SynapseModule(ModelFamily):
    """One module of the family, `name` among `params.MODULES`."""

    # Recurrences over many tokens add up the rounding of each.
    parity_tolerance = 1e-4

    def __init__(self, name: params.Module) -> None:
        self.name = name

    def resolve(self, raw: Config, found: Shapes) -> dict[str, Any]:
        """See `ModelFamily.resolve`."""
        return params.synapse_config({**raw, "module": self.name})

    def recognises(self, found: Shapes) -> bool:
        """See `ModelFamily.recognises`."""
        return params.module_of(found) == self.name

    def shapes(self, config: Config) -> dict[str, Shape]:
        """See `ModelFamily.shapes`."""
        return params.synapse_shapes(config)

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`; a module without experts has no other tensors."""
        return list(self.shapes(config))

    def parameter_count(self, config: Config) -> int:
        """See `ModelFamily.parameter_count`."""
        return params.synapse_parameters(config)[0]
