"""A checkpoint's small files: carried as they are, so that it can be had back.

What a package needs to run stands in its manifest. Files that it keeps unchanged anyway are not
carried twice; of the others a copy lies in a folder that only `convert --to hf` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from evermind_manifests.location import read_head

from .chat_templates import TEMPLATES_FOLDER, TOKENIZER_CONFIG_NAME
from .generation_config import GENERATION_NAME
from .misfits import CONFIG_NAME
from .text import TOKENIZER_NAME

DOCUMENTS_FOLDER: Final = "source/"
#: What a package has at its top under the checkpoint's own name.
SHARED: Final = (
    GENERATION_NAME,
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    "special_tokens_map.json",
)
#: All that is carried.
DOCUMENTS: Final = (
    *SHARED,
    CONFIG_NAME,
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "chat_template.jinja",
)
#: What tokenizers may be made of too; no package may hold files of these kinds.
VOCABULARIES: Final = (
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
)
_MOST_BYTES: Final = 64 << 20


def read_documents(folder: Path, held: Mapping[str, bytes]) -> dict[str, bytes]:
    """Package path → bytes of what the checkpoint has and the package's files `held` have not."""
    found = {}
    templates = sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    for name in (*DOCUMENTS, *(f"{TEMPLATES_FOLDER}/{path.name}" for path in templates)):
        path = folder / name
        data = read_head(path, _MOST_BYTES + 1) if path.is_file() else None
        if data is None or len(data) > _MOST_BYTES or (name in SHARED and held.get(name) == data):
            continue
        found[f"{DOCUMENTS_FOLDER}{name}"] = data
    return found


def made_files(folder: Path, held: Mapping[str, bytes]) -> tuple[str, ...]:
    """The names under which the package's files `held` have something else than the checkpoint."""
    return tuple(
        name
        for name in SHARED
        if name in held
        and not ((folder / name).is_file() and (folder / name).read_bytes() == held[name])
    )


def left_out(folder: Path) -> list[str]:
    """The names of files beside the weights that the package does not hold."""
    return [name for name in VOCABULARIES if (folder / name).is_file()]
