"""How a package is read over the network: one value, handed to `load` and to every store."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from evermind_manifests.errors import BudgetError, InputError

from ..budget import parse_size

CACHE_VARIABLE: Final = "EVERMIND_CACHE"
CACHE_SIZE_VARIABLE: Final = "EVERMIND_CACHE_SIZE"
OFFLINE_VARIABLE: Final = "EVERMIND_OFFLINE"

_DEFAULT_CACHE_BYTES = 20 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")


def default_cache_folder() -> Path:
    """`$EVERMIND_CACHE`, or `evermind-pack` in the user's cache folder (XDG)."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "evermind-pack"


def default_cache_bytes() -> int:
    """`$EVERMIND_CACHE_SIZE` (`50GiB`, or bytes), or 20 GiB. Raises `InputError`."""
    text = os.environ.get(CACHE_SIZE_VARIABLE)
    if not text:
        return _DEFAULT_CACHE_BYTES
    try:
        return parse_size(text, None, CACHE_SIZE_VARIABLE)
    except BudgetError as error:
        raise InputError(error.message) from None


def offline_wanted() -> bool:
    """Whether `$EVERMIND_OFFLINE` forbids the network."""
    return os.environ.get(OFFLINE_VARIABLE, "").lower() not in ("", "0", "false", "no")


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How to read a package that lies elsewhere. Times are in seconds, sizes in bytes.

    `digest` pins the package: any other is refused (local packages too). `offline` uses the
    cache only. `timeout` bounds a connection and each wait for bytes; `retries` is how often
    a request may fail in a row without new bytes. `concurrency` is the most requests in
    flight. `allow_private` lets a public server redirect to private addresses. `headers` are
    sent to the server named in the URL, to no other. `prefetch` fetches the experts that
    profile.json calls hot in the background. Raises `InputError` for values that make no
    sense.
    """

    digest: str | None = None
    offline: bool = field(default_factory=offline_wanted)
    cache_folder: Path = field(default_factory=default_cache_folder)
    cache_bytes: int = field(default_factory=default_cache_bytes)
    timeout: float = 20.0
    retries: int = 8
    backoff: float = 0.2
    concurrency: int = 4
    allow_private: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    prefetch: bool = False

    def __post_init__(self) -> None:
        if self.digest is not None and not _SHA256.fullmatch(self.digest):
            raise InputError(
                f"digest: expected the 64 hex digits of a sha256, found {self.digest[:80]!r}",
                hint="`evermind-pack inspect PKG` shows a package's digest.",
            )
        for name, least in (("cache_bytes", 0), ("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected {least} or more, found {getattr(self, name)}")
        if not self.timeout > 0 or self.backoff < 0:
            raise InputError("timeout and backoff: expected positive seconds")
