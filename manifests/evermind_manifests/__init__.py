"""The package format of evermind-pack: manifest, shards, stores, and their validation.

The names below are loaded when they are first used. The rest is in the modules, such as
`evermind_manifests.validate.validate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .manifest import Manifest
    from .package import Package, open_package
    from .writer import PackageWriter

__all__ = ["Manifest", "Package", "PackageWriter", "open_package"]

_HOME = {
    "Manifest": "manifest",
    "Package": "package",
    "PackageWriter": "writer",
    "open_package": "package",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
