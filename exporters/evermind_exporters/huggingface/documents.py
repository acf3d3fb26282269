"""A checkpoint's small files: carried as they are, so that it can be had back.

What a package needs to run stands in its manifest; these copies are read by nothing but
`convert --to hf`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from evermind_manifests.location import read_head

from .checkpoint import CONFIG_NAME

DOCUMENTS_FOLDER: Final = "source/"
#: Beside weights, tokenizer.json and what lists them.
DOCUMENTS: Final = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "chat_template.jinja",
    "README.md",
)
# What may stand beside them and no package may hold.
_OTHERS: Final = ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
_MOST_BYTES: Final = 64 << 20


def read_documents(folder: Path) -> dict[str, bytes]:
    """Package path → bytes, of those that the checkpoint has."""
    found = {}
    for name in DOCUMENTS:
        path = folder / name
        data = read_head(path, _MOST_BYTES + 1) if path.is_file() else None
        if data is not None and len(data) <= _MOST_BYTES:
            found[f"{DOCUMENTS_FOLDER}{name}"] = data
    return found


def left_out(folder: Path) -> list[str]:
    """The names of files that a tokenizer may be made of and a package does not hold."""
    return [name for name in _OTHERS if (folder / name).is_file()]
