"""Packages that lie elsewhere: web servers and object stores, behind a cache on disk.

`open_remote_package` is what `load` uses; `open_remote_store` gives the bytes as the server
has them, for a validator. See docs/network.md.
"""

from __future__ import annotations

from .open_remote import open_remote_package, open_remote_store
from .options import RemoteOptions
from .urls import is_url

__all__ = [
    "RemoteOptions",
    "is_url",
    "open_remote_package",
    "open_remote_store",
]
