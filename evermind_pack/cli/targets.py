"""The files that commands write results to: checked before anything is computed, written whole."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from evermind_manifests.destination import check_outside_packages, is_package_zip, replacing
from evermind_manifests.errors import InputError


def check_targets(*paths: Path | None, sources: Sequence[str | Path | None] = ()) -> None:
    """Raise `InputError` before anything is computed if a result could not be written.

    Nor may one take the place of `sources`, what is read, or of any package or a file of it.
    """
    targets = [_target(path) for path in paths if path is not None]
    twice = next((target for target in targets if targets.count(target) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: expected a file of its own for each result")
    read = [Path(os.path.realpath(source)) for source in sources if source is not None]
    for target in targets:
        check_outside_packages(target)
        for source in read:
            if _same(target, source):
                raise InputError(f"{target}: it is what is read: expected another file to write")
        if is_package_zip(target):
            raise InputError(f"{target}: it is a package: expected another file to write")


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; a link is written through. Raises `InputError`."""
    with open_target(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_target(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, behind any links, once it is whole.

    Raises `InputError`.
    """
    try:
        with replacing(_target(path)) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _same(target: Path, source: Path) -> bool:
    """Whether both are one file, by another name of it too."""
    if target == source:
        return True
    with contextlib.suppress(OSError):
        return target.samefile(source)
    return False


def _target(path: Path) -> Path:
    """The file that `path` means, behind any links; it can be written or replaced."""
    target = Path(os.path.realpath(path))
    try:
        # A loop of links, and a name too long, fail here.
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(target.stat().st_mode):
                raise InputError(f"{path}: expected a regular file, found something else")
        if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
            raise InputError(f"{path}: its folder is not there, or cannot be written to")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return target
