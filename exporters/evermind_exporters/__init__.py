"""Write packages: graphs, shards and manifests from models and checkpoints."""

from __future__ import annotations

from .export import ExportOptions, export_package
from .source import ModelSource, read_source, with_peer_tokenizer

__all__ = ["ExportOptions", "ModelSource", "export_package", "read_source", "with_peer_tokenizer"]
