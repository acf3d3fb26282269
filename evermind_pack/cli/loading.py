"""A package loaded for a command: what loading warns of becomes a remark."""

from __future__ import annotations

import warnings
from typing import Any

from evermind_runtime import Model, PagingWarning, load

from .terminal import remark


def load_model(package: str, *, quiet: bool, **options: Any) -> Model:
    """`evermind_runtime.load` with these options; raises what it raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PagingWarning)
        model = load(package, **options)
    for warning in caught:
        remark(f"warning: {warning.message}", quiet=quiet)
    return model
