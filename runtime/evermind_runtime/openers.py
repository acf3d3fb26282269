"""What `load` opens: a package here or at a URL, or a file that somebody makes one of.

Another installed distribution registers an opener in the entry point group
`evermind_runtime.openers`. Its name is the file's first four bytes in hex, its value a
function from a path to a `Package`. So the runtime reads foreign files without knowing, or
importing, what reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from evermind_manifests.errors import MissingExtraError
from evermind_manifests.location import read_head
from evermind_manifests.package import Package, open_package

from .stores.options import RemoteOptions
from .stores.urls import is_url

GROUP = "evermind_runtime.openers"


def open_location(location: str | os.PathLike[str], remote: RemoteOptions | None = None) -> Package:
    """The package at `location`: a folder, a `.zip`, a URL, or a file with a registered opener.

    `remote` says how to read a URL, and which package alone will do, wherever it lies. Raises
    what `open_package`, `open_remote_package` or the opener raises, `DigestError` for
    another package than the one asked for, and `MissingExtraError` if the opener's own
    dependencies are not installed.
    """
    options = remote or RemoteOptions()
    if is_url(location):
        from .stores.open_remote import open_remote_package

        return open_remote_package(str(location), options)
    package = _open_here(location)
    if options.digest is not None:
        from .stores.open_remote import check_pin

        try:
            check_pin(package.digest, options.digest, package.location)
        except BaseException:
            package.close()
            raise
    return package


def _open_here(location: str | os.PathLike[str]) -> Package:
    head = read_head(location, 4)
    if head is None:
        return open_package(location)
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP, name=head.hex()):
        try:
            opener = cast(Callable[[Path], Package], entry.load())
        except ImportError as error:
            raise MissingExtraError(
                error.name or "onnx", "export", f"Reading {location} without converting it"
            ) from error
        return opener(Path(location))
    return open_package(location)
