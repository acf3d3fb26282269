"""Which tensor of a checkpoint becomes which parameter: transformers' own conversion mapping."""

from __future__ import annotations

from typing import Any, NamedTuple

from .checkpoint import Checkpoint


class Renamed(NamedTuple):
    """A checkpoint's tensor and the parameter that it becomes, or becomes a part of.

    `pattern` is the source pattern of the converter that makes the parameter out of it and
    perhaps others; None where the parameter is the tensor.
    """

    name: str
    target: str
    pattern: str | None


class Conversion:
    """How transformers would load a checkpoint: renamings, then at most one conversion each."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        """`model` is the whole transformers model; it may lie on the meta device."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        #: The converter of every source pattern.
        self.converters: dict[str, Any] = {
            pattern: one for one in converters for pattern in one.source_patterns
        }
        #: Every tensor of the checkpoint, in the order in which they are loaded.
        self.renamed: list[Renamed] = []
        parameters = model.state_dict()
        prefix = model.base_model_prefix
        for name in sorted(checkpoint.names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
            if target not in parameters and name in parameters:
                target, pattern = rename_source_key(name, [], [], prefix, parameters)
            self.renamed.append(Renamed(name, target, pattern))
