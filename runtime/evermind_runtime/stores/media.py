"""What kind of file each suffix of a package is, as servers tell browsers."""

from __future__ import annotations

from typing import Final

_TYPES: Final = {
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".jinja": "text/plain; charset=utf-8",
    ".png": "image/png",
    # For the page that runs the package.
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}


def media_type(path: str) -> str:
    """The Content-Type of a file; bytes without a type of their own are octets."""
    dot = path.rfind(".")
    return _TYPES.get(path[dot:].lower() if dot >= 0 else "", "application/octet-stream")
