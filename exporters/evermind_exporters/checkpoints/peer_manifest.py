"""The JSON manifest inside an `.evermind` file: parsed strictly, kept to the letter.

Keys, their order and unknown keys survive: `update` gives the same text back when nothing
changed. Source: specs/evermind-formats.md, sections 12.1 and 12.2. Strict where the peer is
not: duplicate keys, wrong types, missing dimensions and impossible numbers are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from evermind_manifests.errors import CheckpointError, ConfigError
from evermind_manifests.manifest import Card

from .params import Family, dim_names, validate_config

SCHEMA: Final = "evermind.model/1"
MODALITIES: Final = ("text", "video", "image")
MEDIA: Final = ("video", "image")
MAX_BYTES: Final = 64 * 1024 * 1024

# `modelType` is the family's name; a limbic model cannot be packaged.
CHECKPOINT_FORMATS: Final[dict[Family, str]] = {
    "shared-expert-moe": "MoE0",
    "evermind-lm": "EVL0",
}
CODEC_FORMAT: Final = "VRQ0"

# The peer's card keys, and ours.
_CARD_KEYS: Final = {
    "description": "description",
    "trainingSummary": "training_summary",
    "license": "license",
    "author": "author",
    "tags": "tags",
}
_MAX_DEPTH = 32
_MAX_NAME = 256  # characters, evermind_manifests.manifest.Name
_U32 = 2**32
_TYPES: Final[dict[str, type]] = {
    "name": str,
    "version": str,
    "paramCount": int,
    "checkpointFormat": str,
    "checkpointFp16": bool,
    "codecFormat": str,
    "card": dict,
    "createdAt": str,
}


@dataclass(frozen=True, slots=True)
class PeerManifest:
    """A manifest that passed every check one can make without the checkpoint.

    `values` is the parsed JSON in its order, `text` the exact JSON, `family` and `config`
    are what `modelType` and `config` say, with `config` resolved by `validate_config`.
    """

    values: Mapping[str, Any]
    text: str
    family: Family
    config: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str | None:
        """The model's name; `None` where it is missing or no name of ours (1 to 256 characters)."""
        return _as_name(self.values.get("name"))

    @property
    def version(self) -> str | None:
        """The model's version; `None` as for `name`."""
        return _as_name(self.values.get("version"))

    @property
    def media(self) -> bool:
        """Whether a codec section must follow the checkpoint."""
        return self.values.get("modality") in MEDIA

    @property
    def checkpoint_bytes(self) -> int | None:
        """The stated length of the checkpoint; `None`: it reaches to the end of the file."""
        value: int | None = self.values.get("checkpointBytes")
        return value

    @property
    def card(self) -> Card:
        """The model card's fields that our packages have too."""
        card = self.values.get("card") or {}
        known: dict[str, Any] = {
            ours: tuple(card[key]) if key == "tags" else card[key]
            for key, ours in _CARD_KEYS.items()
            if card.get(key) is not None
        }
        return Card(**known)

    def update(self, changes: Mapping[str, Any]) -> PeerManifest:
        """The manifest with these keys set; the very same text if they had these values.

        Else the JSON is written anew; a number with an exponent may then be spelled another way.
        """
        values = {**self.values, **changes}
        if _same(values, self.values):
            return self
        return parse_peer_manifest(encode(values).encode(), "manifest")

    def with_card(self, card: Card) -> PeerManifest:
        """The manifest with those card fields set that differ from its own."""
        old = self.card
        changed: dict[str, Any] = {}
        for key, ours in _CARD_KEYS.items():
            value = getattr(card, ours)
            if value != getattr(old, ours):
                changed[key] = list(value) if isinstance(value, tuple) else value
        if not changed:
            return self
        # The peer's keys vanish when their value is undefined; null would be another thing.
        merged = {**(self.values.get("card") or {}), **changed}
        return self.update({"card": {k: v for k, v in merged.items() if v is not None}})


def parse_peer_manifest(data: bytes, where: str) -> PeerManifest:
    """Parse and check the bytes of a manifest; raises `CheckpointError` saying what is wrong."""
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{where}: manifest: over {MAX_BYTES:,} bytes, found {len(data):,}")
    try:
        text = data.decode()
        values = json.loads(
            text,
            object_pairs_hook=_refuse_duplicates,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
        # A lone surrogate, written as an escape, is no text.
        json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: manifest: {error or 'nested too deeply'}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{where}: manifest: expected a JSON object, found {type(values).__name__}"
        )
    _check_depth(values, where)
    _check_values(values, where)
    family = cast(Family, values["modelType"])
    return PeerManifest(values, text, family, _check_config(values, family, where))


def encode(values: Mapping[str, Any]) -> str:
    """JSON text as the peer's `JSON.stringify` writes it (strings, integers, lists, objects)."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def new_peer_manifest(
    family: Family,
    config: Mapping[str, Any],
    *,
    name: str,
    version: str,
    card: Card,
    created: str | None,
) -> PeerManifest:
    """A manifest for a model that never was in the peer; checkpoint fields are filled later.

    Keys stand in the order the peer writes them. Raises `ConfigError` for a limbic model,
    which the peer cannot package.
    """
    if family not in CHECKPOINT_FORMATS:
        raise ConfigError(
            f"an .evermind file holds {' or '.join(CHECKPOINT_FORMATS)}, not {family}"
        )
    resolved = validate_config(family, config)
    if family == "evermind-lm":
        resolved = {key: resolved[key] for key in dim_names(family)}
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "name": name,
        "version": version,
        "modelType": family,
        "config": resolved,
        "paramCount": 0,
        "checkpointFormat": CHECKPOINT_FORMATS[family],
        "checkpointFp16": False,
        "checksum": 0,
        "card": {
            key: list(value) if isinstance(value, tuple) else value
            for key, ours in _CARD_KEYS.items()
            if (value := getattr(card, ours)) or key == "description"
        },
    }
    if created:
        values["createdAt"] = created
    return parse_peer_manifest(encode(values).encode(), "manifest")


def _check_values(values: dict[str, Any], where: str) -> None:
    _expect(values.get("schema") == SCHEMA, where, "schema", repr(SCHEMA), values)
    models = " or ".join(CHECKPOINT_FORMATS)
    model_type = values.get("modelType")
    known = isinstance(model_type, str) and model_type in CHECKPOINT_FORMATS
    _expect(known, where, "modelType", models, values)
    if "modality" in values:
        modality = values["modality"]
        _expect(modality in MODALITIES, where, "modality", ", ".join(MODALITIES), values)
    for key, kind in _TYPES.items():
        if key in values:
            _expect(type(values[key]) is kind, where, key, kind.__name__, values)
    _expect(_is_u32(values.get("checksum")), where, "checksum", "an unsigned 32-bit number", values)
    if values.get("modality") in MEDIA:
        found = _is_u32(values.get("codecChecksum"))
        _expect(found, where, "codecChecksum", "an unsigned 32-bit number", values)
    if values.get("checkpointBytes") is not None:
        length = values["checkpointBytes"]
        _expect(type(length) is int and length >= 0, where, "checkpointBytes", "a length", values)
    for key, value in values.get("card", {}).items():
        if key == "tags":
            right = isinstance(value, list) and all(isinstance(tag, str) for tag in value)
            _expect(right, f"{where}: card", key, "a list of strings", values["card"])
        elif key in _CARD_KEYS:
            _expect(isinstance(value, str), f"{where}: card", key, "a string", values["card"])


def _check_config(values: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    config = values.get("config")
    _expect(isinstance(config, dict), where, "config", "an object", values)
    assert isinstance(config, dict)
    for key in dim_names(family):
        _expect(key in config, f"{where}: config", key, "a dimension", config)
    try:
        return validate_config(family, config)
    except ConfigError as error:
        raise CheckpointError(f"{where}: manifest: {error.message}") from error


def _expect(right: bool, where: str, key: str, expected: str, values: Mapping[str, Any]) -> None:
    if not right:
        found = repr(values[key])[:80] if key in values else "nothing"
        raise CheckpointError(f"{where}: manifest: {key}: expected {expected}, found {found}")


def _as_name(value: str | None) -> str | None:
    return value if value and len(value) <= _MAX_NAME else None


def _is_u32(value: Any) -> bool:
    return type(value) is int and 0 <= value < _U32


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON, key order included: `1`, `1.0` and `true` are three values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _check_depth(values: dict[str, Any], where: str) -> None:
    level: list[Any] = [values]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                below.extend(value.values() if isinstance(value, dict) else value)
        level = below
        if not level:
            return
    raise CheckpointError(f"{where}: manifest: nested more than {_MAX_DEPTH} levels deep")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _parse_int(text: str) -> int:
    # What fits neither a double nor 64 bits would change on the way through any reader.
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"the number {text[:30]} does not fit 64 bits")
    return value


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:30]} is too large")
    return value


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
