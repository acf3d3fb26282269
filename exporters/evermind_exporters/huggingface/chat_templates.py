"""The chat templates of a checkpoint: Jinja files, or a field of `tokenizer_config.json`.

As transformers reads them: `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, and
where there is no such file the field `chat_template`, a text or a list of `{name, template}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from evermind_manifests.errors import CheckpointError, InputError, TemplateError
from evermind_manifests.location import read_head
from evermind_runtime.template_process import TemplateProcess

from .checkpoint import read_json

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"
DEFAULT = "default"

MAX_TEMPLATE_BYTES = 1 << 20
_MOST = 32
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read_chat_templates(folder: Path) -> dict[str, bytes]:
    """Templates by name. Raises `CheckpointError` for what is no template, or over 1 MiB."""
    found = {
        DEFAULT if path.name == TEMPLATE_NAME else path.stem: _read(path)
        for path in [folder / TEMPLATE_NAME, *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))]
        if path.is_file()
    }
    config = folder / TOKENIZER_CONFIG_NAME
    if not found and config.is_file():
        listed = read_json(config).get("chat_template")
        found = {
            name: text.encode("utf-8", "surrogatepass") for name, text in _listed(listed, config)
        }
    if len(found) > _MOST:
        raise CheckpointError(f"{folder}: expected at most {_MOST} chat templates")
    for name, data in found.items():
        _check(name, data, folder)
    return found


def why_not(template: bytes, special_tokens: Mapping[str, str]) -> str | None:
    """Why a template makes no text of one message of a user, in a sentence; None where it does."""
    values = {
        **special_tokens,
        "documents": None,
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": None,
        "add_generation_prompt": True,
    }
    with closing(TemplateProcess()) as process:
        try:
            process.render(template.decode(), values)
        except (InputError, TemplateError) as error:
            return error.message
    return None


def template_path(name: str) -> str:
    """Where a package keeps the template of that name: where checkpoints do."""
    return TEMPLATE_NAME if name == DEFAULT else f"{TEMPLATES_FOLDER}/{name}.jinja"


def _listed(value: Any, path: Path) -> list[tuple[str, str]]:
    if value is None:
        return []
    if isinstance(value, str):
        return [(DEFAULT, value)]
    pairs = value if isinstance(value, list) else None
    if pairs is None or not all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("template"), str)
        for one in pairs
    ):
        raise CheckpointError(
            f"{path}: chat_template: expected a text, or a list of objects with name and template"
        )
    return [(one["name"], one["template"]) for one in pairs]


def _read(path: Path) -> bytes:
    data = read_head(path, MAX_TEMPLATE_BYTES + 1)
    if data is None:
        raise CheckpointError(f"{path}: cannot be read")
    return data


def _check(name: str, data: bytes, folder: Path) -> None:
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{folder}: chat template {name!r:.80}: expected a name of letters, digits, _ and -"
        )
    if len(data) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(
            f"{folder}: chat template {name!r}: expected at most {MAX_TEMPLATE_BYTES:,} bytes"
        )
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder}: chat template {name!r}: not UTF-8: {error}") from error
