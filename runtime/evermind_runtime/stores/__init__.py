"""Packages that lie elsewhere: web servers and object stores, behind a cache on disk.

`open_remote.open_remote_package` is what `load` uses; `open_remote.open_remote_store` gives the
bytes as the server has them, for a validator. See docs/network.md. What talks to servers is
imported when a URL is opened, for most packages lie on a disk.
"""

from __future__ import annotations

from .options import RemoteOptions
from .urls import is_url

__all__ = ["RemoteOptions", "is_url"]
