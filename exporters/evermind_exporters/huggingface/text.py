"""What a checkpoint says about text: its tokenizer and the tokens that end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evermind_manifests.errors import CheckpointError
from evermind_manifests.manifest import Generation

from .checkpoint import CONFIG_NAME, read_json

TOKENIZER_NAME = "tokenizer.json"
GENERATION_NAME = "generation_config.json"


def read_tokenizer(folder: Path) -> bytes | None:
    """The bytes of tokenizer.json, if the checkpoint has one."""
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        return None
    read_json(path)
    return path.read_bytes()


def read_generation(folder: Path, vocabulary: int) -> Generation:
    """The tokens that end a text: generation_config.json's, else config.json's.

    A token outside the vocabulary ends nothing and is left out (configurations of tiny models
    keep their big sibling's). Raises `CheckpointError` for what is no token id.
    """
    for name in (GENERATION_NAME, CONFIG_NAME):
        path = folder / name
        if path.is_file() and (found := read_json(path).get("eos_token_id")) is not None:
            return Generation(stop_tokens=_tokens(found, vocabulary, path))
    return Generation()


def _tokens(found: Any, vocabulary: int, path: Path) -> tuple[int, ...]:
    tokens = found if isinstance(found, list) else [found]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in tokens):
        raise CheckpointError(f"{path}: eos_token_id: expected token ids, found {found!r}")
    return tuple(one for one in tokens if one < vocabulary)
