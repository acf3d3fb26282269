"""Packages moved whole: compared by digest, copied to a folder, a web server or a bucket."""

from __future__ import annotations

from .copy import Copied, copy_package
from .diff import Difference, diff_manifests
from .targets import open_target

__all__ = ["Copied", "Difference", "copy_package", "diff_manifests", "open_target"]
