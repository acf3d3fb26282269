"""Serve a package to others: its files as a static origin."""

from __future__ import annotations

from .static import PackageServer

__all__ = ["PackageServer"]
