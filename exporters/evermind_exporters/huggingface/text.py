"""What a checkpoint says about text: tokenizer, chat templates, defaults for generation.

The tokenizer is the one that transformers makes of the folder, which is not always what
`tokenizer.json` says: `tokenizer_config.json` may add tokens or a bos, and some classes build
their own from the vocabulary. Where the two are the same, the file is kept byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evermind_manifests.errors import CheckpointError, UnsupportedError
from evermind_manifests.manifest import Generation, Tokenizer

from .chat_templates import (
    DEFAULT,
    TOKENIZER_CONFIG_NAME,
    read_chat_templates,
    template_path,
    why_not,
)
from .checkpoint import read_json
from .generation_config import GENERATION_NAME, read_generation
from .quiet import quiet

TOKENIZER_NAME = "tokenizer.json"
# Kept as they are, for whoever wants what the package's own fields do not say.
_KEPT = (GENERATION_NAME, TOKENIZER_CONFIG_NAME, "special_tokens_map.json")
# What tokenizers are made of; without one of these a folder has none.
_VOCABULARIES = (
    TOKENIZER_NAME,
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_MAX_SPECIAL = 1024


@dataclass(frozen=True, slots=True)
class Text:
    """A package's files about text, its manifest's fields, and notes on what is not carried.

    `vocabulary` is how many tokens the model has that it was read for.
    """

    vocabulary: int
    generation: Generation
    tokenizer: Tokenizer | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_text(folder: Path, vocabulary: int) -> Text:
    """Everything `folder` says about text, for a model with `vocabulary` tokens.

    Raises `CheckpointError` for damaged files. A tokenizer that cannot be carried is told of in
    the notes: token ids can be given and taken without one.
    """
    files = {
        name: (folder / name).read_bytes()
        for name in _KEPT
        if (folder / name).is_file() and read_json(folder / name) is not None
    }
    notes: list[str] = []
    found = _tokenizer(folder, notes)
    if found is None and not notes:
        notes.append("the checkpoint has no tokenizer: `run` will take --tokens, and no text")
    eos = found.eos if found and found.eos is not None and found.eos < vocabulary else None
    generation, remarks = read_generation(folder, vocabulary, eos)
    notes += remarks
    if found is None:
        return Text(vocabulary, generation, files=files, notes=tuple(notes))
    if found.size > vocabulary:
        notes.append(
            f"the tokenizer has {found.size:,} tokens, the model {vocabulary:,}: text with a "
            "token that the model does not know is refused"
        )
    templates = read_chat_templates(folder)
    if DEFAULT in templates and (reason := why_not(templates[DEFAULT], found.special)):
        notes.append(f"`run --chat` will fail with one message of a user alone: {reason}")
    files[TOKENIZER_NAME] = found.data
    files |= {template_path(name): data for name, data in templates.items()}
    tokenizer = Tokenizer(
        kind="tokenizers",
        file=TOKENIZER_NAME,
        chat_templates={name: template_path(name) for name in sorted(templates)},
        special_tokens=found.special,
    )
    return Text(vocabulary, generation, tokenizer, files, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Found:
    """A tokenizer as tokenizer.json, how many tokens it has, and which are special."""

    data: bytes
    size: int
    special: dict[str, str]
    eos: int | None


def _tokenizer(folder: Path, notes: list[str]) -> _Found | None:
    """The folder's tokenizer, if it has one; adds to `notes` where it is not simply its file."""
    path = folder / TOKENIZER_NAME
    own = _own(folder) if path.is_file() else None
    if own is None and not any((folder / name).is_file() for name in _VOCABULARIES):
        return None
    try:
        made = _made(folder)
    except Exception as error:  # whatever a tokenizer's class raises
        kept = "so its file is taken as it is" if own else "and is not carried"
        reason = str(error).partition("\n")[0][:300]
        notes.append(f"the tokenizer cannot be loaded by transformers, {kept}: {reason}")
        return own
    if own is None:
        notes.append(f"{TOKENIZER_NAME} is made from the vocabulary, as transformers does")
        return made
    theirs, ours = _plain(made.data), _plain(own.data)
    if theirs == ours:
        return replace(made, data=own.data)
    if theirs["model"]["type"] != ours["model"]["type"]:
        notes.append(
            f"transformers makes a {theirs['model']['type']} tokenizer of {TOKENIZER_NAME}, which "
            f"is a {ours['model']['type']} one: the file is taken as it is"
        )
        return own
    notes.append(f"{TOKENIZER_NAME} is stored as transformers sets it up, not as it is")
    return made


def _made(folder: Path) -> _Found:
    """What transformers makes of the folder."""
    from transformers import AutoTokenizer

    with quiet():
        loaded: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if loaded.split_special_tokens:
        raise UnsupportedError(f"{TOKENIZER_CONFIG_NAME}: split_special_tokens is not carried")
    data = json.dumps(_plain(loaded.backend_tokenizer.to_str().encode()), ensure_ascii=False)
    return _Found(
        data.encode(), len(loaded), _checked(loaded.special_tokens_map, folder), loaded.eos_token_id
    )


def _own(folder: Path) -> _Found:
    """What the folder's files say, tokenizer_config.json's special tokens among them."""
    from tokenizers import Tokenizer as Backend

    path = folder / TOKENIZER_NAME
    read_json(path)
    data = path.read_bytes()
    try:
        backend = Backend.from_buffer(data)
    except Exception as error:  # tokenizers raises nothing more precise
        raise CheckpointError(f"{path}: not a tokenizer.json: {error}") from error
    config = folder / TOKENIZER_CONFIG_NAME
    said = read_json(config) if config.is_file() else {}
    special = {}
    for name in _SPECIAL:
        value = said.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
    eos = backend.token_to_id(special.get("eos_token", ""))
    return _Found(data, backend.get_vocab_size(), _checked(special, folder), eos)


def _checked(special: Mapping[str, str], folder: Path) -> dict[str, str]:
    for name, text in special.items():
        if not 0 < len(text) <= _MAX_SPECIAL:
            raise CheckpointError(
                f"{folder}: {name}: expected a text of 1 to {_MAX_SPECIAL} characters"
            )
    return dict(special)


def _plain(data: bytes) -> dict[str, Any]:
    """A tokenizer.json without what changes no ids: lengths, and a processor of nothing.

    Parsed and written by `tokenizers`, so that two spellings of the same are equal.
    """
    from tokenizers import Tokenizer as Backend

    found: dict[str, Any] = json.loads(Backend.from_buffer(data).to_str())
    found |= {"truncation": None, "padding": None}
    processor = found.get("post_processor") or {}
    if processor.get("type") == "TemplateProcessing" and not processor.get("special_tokens"):
        found["post_processor"] = None
    return found
