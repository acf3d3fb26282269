"""Where results may be written: never into a package, and whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import EvermindPackError, InputError, LocationError
from .location import read_head
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SCHEMA
from .zip_store import ZipStore


def is_package(folder: Path) -> bool:
    """Whether a folder's manifest.json is a package's, and not a web page's, say."""
    try:
        head = read_head(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except LocationError:
        return False
    return head is not None and SCHEMA.encode() in head


def is_package_zip(path: Path) -> bool:
    """The same of a single file: whether it is a zip whose manifest.json is a package's."""
    try:
        with ZipStore(path) as store:
            return SCHEMA.encode() in store.read(MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
    except (EvermindPackError, OSError):
        return False


def check_outside_packages(place: Path) -> None:
    """Raise `InputError` if `place`, behind any links, lies inside the folder of a package."""
    target = Path(os.path.realpath(place))
    for folder in target.parents:
        if is_package(folder):
            raise InputError(
                f"{place}: it would be a file of the package {folder}",
                hint="Write it elsewhere: a package holds what its manifest.json lists, "
                "and changed it is damaged.",
            )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole, and is gone if it never is.

    Its bytes are on the disk by then. Raises `OSError` as writing does.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
