"""Write packages: graphs, shards and manifests from models and checkpoints."""

from __future__ import annotations

from .export import ExportOptions, export_package
from .source import ModelSource, read_source

__all__ = ["ExportOptions", "ModelSource", "export_package", "read_source"]
