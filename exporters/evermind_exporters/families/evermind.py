"""What the three Evermind families share: their lists of dimensions and tensors are the peer's."""

from __future__ import annotations

from typing import Any

from ..checkpoints import params
from ..family import Config, ModelFamily, Shape, Shapes


class EvermindFamily(ModelFamily):
    """A family whose configuration and tensors `checkpoints/params.py` lists."""

    name: params.Family

    def resolve(self, raw: Config, found: Shapes) -> dict[str, Any]:
        """See `ModelFamily.resolve`; unknown keys are kept."""
        return params.validate_config(self.name, raw)

    def recognises(self, found: Shapes) -> bool:
        """See `ModelFamily.recognises`."""
        return params.MARKS[self.name] <= {self.canonical_name(name) for name in found}

    def shapes(self, config: Config) -> dict[str, Shape]:
        """See `ModelFamily.shapes`."""
        return params.canonical_shapes(self.name, config)

    def parameter_count(self, config: Config) -> int:
        """See `ModelFamily.parameter_count`."""
        return params.parameter_count(self.name, config)
