"""The package format of evermind-pack: manifest, shards, stores, and their validation.

The names below are loaded when they are first used; the rest is in the modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .manifest import Manifest
    from .package import Package, open_package
    from .validate import Report, validate
    from .writer import PackageWriter

__all__ = ["Manifest", "Package", "PackageWriter", "Report", "open_package", "validate"]

_HOME = {
    "Manifest": "manifest",
    "Package": "package",
    "PackageWriter": "writer",
    "Report": "validate",
    "open_package": "package",
    "validate": "validate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
