"""`synapse`: a recurrent language model with pools of SwiGLU experts, whole or by its modules.

Formulas, names and shapes: specs/synapse.md.
"""

from __future__ import annotations

from ...family import ModularFamily
from .experts import ExpertModule, PoolModule
from .model import SynapseModel
from .recurrent import FastWeightsModule, MambaModule, ThalamusModule, XlstmModule


class Synapse(ModularFamily):
    """See the module."""

    parity_tolerance = SynapseModel.parity_tolerance

    def canonical_name(self, name: str) -> str | None:
        """See `ModelFamily.canonical_name`; the memories' buffers are state, not weights."""
        return None if name.rpartition(".")[2] == "fast_weights" else name


FAMILY = Synapse(
    "synapse",
    {
        module.name: module
        for module in (
            SynapseModel("model"),
            ExpertModule("expert"),
            PoolModule("pool"),
            MambaModule("mamba"),
            ThalamusModule("thalamus"),
            XlstmModule("xlstm"),
            FastWeightsModule("fast_weights"),
        )
    },
)
