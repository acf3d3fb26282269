"""JSON in a file that somebody else may have written: bounded, and no key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import EvermindPackError
from .location import read_head
from .unique_keys import unique_keys


def read_object(path: Path, most_bytes: int, error: type[EvermindPackError]) -> dict[str, Any]:
    """The object in `path`; raises as `read_json` does, and `error` for another value."""
    value = read_json(path, most_bytes, error)
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path, most_bytes: int, error: type[EvermindPackError]) -> Any:
    """The value in `path`.

    Raises `LocationError` where there is no file, `error` for what is no JSON, has a key twice or
    is over `most_bytes`.
    """
    data = read_head(path, most_bytes + 1)
    if data is None or len(data) > most_bytes:
        raise error(f"{path}: expected a JSON file of at most {most_bytes:,} bytes")
    try:
        value = json.loads(data, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: not JSON: {cause}") from cause
    return value
