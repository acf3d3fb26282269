"""Write packages: graphs, shards and manifests from models and checkpoints.

The names below are loaded when they are first used, so that `evermind_exporters.checkpoints`,
which needs numpy alone, can be had without onnx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert_package, convert_to_bundle, write_file, write_folder
    from .export import ExportOptions, export_package
    from .source import ModelSource, read_source, with_peer_tokenizer

__all__ = [
    "ExportOptions",
    "ModelSource",
    "convert_package",
    "convert_to_bundle",
    "export_package",
    "read_source",
    "with_peer_tokenizer",
    "write_file",
    "write_folder",
]

_HOME = {
    "ExportOptions": "export",
    "ModelSource": "source",
    "convert_package": "convert",
    "convert_to_bundle": "convert",
    "export_package": "export",
    "read_source": "source",
    "with_peer_tokenizer": "source",
    "write_file": "convert",
    "write_folder": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
