"""Write packages: graphs, shards and manifests from models and checkpoints."""

from __future__ import annotations

from .convert import convert_package, write_file
from .export import ExportOptions, export_package
from .source import ModelSource, read_source, with_peer_tokenizer

__all__ = [
    "ExportOptions",
    "ModelSource",
    "convert_package",
    "export_package",
    "read_source",
    "with_peer_tokenizer",
    "write_file",
]
