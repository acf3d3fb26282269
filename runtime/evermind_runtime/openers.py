"""What `load` opens: a package, or a file that another installed distribution makes one of.

A distribution registers an opener in the entry point group `evermind_runtime.openers`. Its
name is the file's first four bytes in hex, its value a function from a path to a `Package`.
So the runtime reads foreign files without knowing, or importing, what reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

from evermind_manifests.errors import MissingExtraError
from evermind_manifests.location import read_head
from evermind_manifests.package import Package, open_package

GROUP = "evermind_runtime.openers"


def open_location(location: str | os.PathLike[str]) -> Package:
    """The package at `location`: a folder, a `.zip` file, or a file with a registered opener.

    Raises what `open_package` or the opener raises, and `MissingExtraError` if the opener's
    own dependencies are not installed.
    """
    head = read_head(location, 4)
    if head is None:
        return open_package(location)
    for entry in entry_points(group=GROUP, name=head.hex()):
        try:
            opener = cast(Callable[[Path], Package], entry.load())
        except ImportError as error:
            raise MissingExtraError(
                error.name or "onnx", "export", f"Reading {location} without converting it"
            ) from error
        return opener(Path(location))
    return open_package(location)
