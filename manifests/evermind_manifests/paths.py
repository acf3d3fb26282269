"""Which paths a package may contain: relative, contained, portable, of a known kind.

Stricter than any one operating system, so that a package that is valid here unpacks to
the same files everywhere. Case-fold collisions need two paths: see `structure.py`.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from .errors import PathError, UnsupportedError

# No executable content: a package consists of data and graphs only.
ALLOWED_SUFFIXES: Final[frozenset[str]] = frozenset(
    {".onnx", ".safetensors", ".moe0", ".moe0p", ".json", ".jinja", ".md", ".sig", ".png"}
)
MAX_PATH_BYTES: Final = 1024
MAX_PART_BYTES: Final = 255

_ORDINARY_PART = r"(?!(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])[./])[A-Za-z0-9_-]{1,64}"
# What exporters write: every check below passes at once. No dot but the suffix's, so that no
# such file can be the folder of another; no device; not the manifest. Others get a closer look.
ORDINARY: Final = re.compile(
    rf"(?!manifest\.)(?:{_ORDINARY_PART}/){{0,7}}{_ORDINARY_PART}"
    rf"\.(?:{'|'.join(sorted(suffix[1:] for suffix in ALLOWED_SUFFIXES))})"
)
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
_UNPORTABLE = frozenset('\\:<>"|?*')
# Control and format characters, lone surrogates, line and paragraph separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$"}
    | {f"{name}{digit}" for name in ("com", "lpt") for digit in "0123456789¹²³"}
)


def check_path(path: str) -> None:
    """Raise `PathError` unless `path` is a portable relative path, with parts split by `/`."""
    if not _PLAIN.fullmatch(path):
        _check_characters(path)
    for part in path.split("/"):
        _check_part(part, path)
    if len(path.encode()) > MAX_PATH_BYTES:
        raise PathError(f"{path[:80]!r}…: longer than {MAX_PATH_BYTES} bytes")


def check_file_kind(path: str) -> None:
    """Raise `UnsupportedError` unless the path's suffix is on the allow-list."""
    dot = path.rfind(".")
    suffix = path[dot:].lower() if dot > path.rfind("/") else ""
    if suffix not in ALLOWED_SUFFIXES:
        raise UnsupportedError(
            f"{path!r}: files of kind {suffix or '(no suffix)'!r} do not belong in a package;"
            f" expected one of {' '.join(sorted(ALLOWED_SUFFIXES))}"
        )


def _check_characters(path: str) -> None:
    if not path:
        raise PathError("a path is empty")
    if path.startswith("/"):
        raise PathError(f"{path!r}: absolute; a package's paths are relative")
    for character in path:
        if character in _UNPORTABLE or unicodedata.category(character) in _INVISIBLE:
            raise PathError(f"{path!r}: the character {character!r} is not portable")
    if unicodedata.normalize("NFC", path) != path:
        raise PathError(f"{path!r}: not in Unicode normal form C")


def _check_part(part: str, path: str) -> None:
    if part in ("", ".", ".."):
        raise PathError(f"{path!r}: the part {part!r} is not allowed")
    if part[0] in ". " or part[-1] in ". ":
        raise PathError(f"{path!r}: the part {part!r} begins or ends with a dot or a space")
    if part.split(".", 1)[0].rstrip().lower() in _DEVICES:
        raise PathError(f"{path!r}: {part!r} is a device name on Windows")
    if len(part.encode()) > MAX_PART_BYTES:
        raise PathError(f"{path[:80]!r}: a part is longer than {MAX_PART_BYTES} bytes")
