"""Everything that is wrong with the bytes of a manifest.json.

Parsing for use stops at the first error; a validator's reader wants all of them. So a
manifest that does not parse is taken apart and its fields are converted one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import inspect

from .errors import ManifestError, UnsupportedError
from .manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest
from .problems import Problem, problem, problem_of
from .structure import check_files, check_structure

_MAX_PER_FIELD = 100


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`manifest` is None where it does not parse; `files` is then what could be read of it."""

    manifest: Manifest | None
    problems: list[Problem]
    files: Mapping[str, FileEntry] = field(default_factory=dict)


def diagnose_manifest(data: bytes) -> Diagnosis:
    """Parse a manifest; report its errors, its contradictions and the keys it should not have."""
    try:
        manifest = parse_manifest(data)
    except UnsupportedError as error:
        return Diagnosis(None, [problem_of("manifest-unsupported", MANIFEST_NAME, error)])
    except ManifestError as error:
        first = problem_of("manifest-invalid", MANIFEST_NAME, error)
        return _take_apart(data, first)
    problems = check_structure(manifest)
    for key, place in _unknown_keys(json.loads(data), inspect.type_info(Manifest), ""):
        problems.append(problem("unknown-key", place or MANIFEST_NAME, f"unknown key {key!r}"))
    return Diagnosis(manifest, problems, manifest.files)


def _take_apart(data: bytes, first: Problem) -> Diagnosis:
    """Convert a broken manifest field by field; `first` is what made parsing stop."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return Diagnosis(None, [first])
    if not isinstance(raw, dict):
        return Diagnosis(None, [first])
    problems: list[Problem] = []
    files: dict[str, FileEntry] = {}
    for info in msgspec.structs.fields(Manifest):
        name = info.encode_name
        if name not in raw:
            if info.required:
                problems.append(problem("manifest-invalid", name, "missing"))
            continue
        found = list(_field_problems(name, raw[name], info.type))
        problems += found[:_MAX_PER_FIELD]
        if name == "files" and isinstance(raw[name], dict):
            files = dict(_sound_entries(raw[name]))
            problems += check_files(files)
    return Diagnosis(None, problems or [first], files)


def _field_problems(name: str, value: Any, kind: Any) -> Iterator[Problem]:
    """The errors of one field: of each element by itself where it has elements."""
    info = inspect.type_info(kind)
    if isinstance(info, inspect.VarTupleType) and isinstance(value, list):
        elements = [(f"{name}[{number}]", item) for number, item in enumerate(value)]
        element_type = kind.__args__[0]
    elif isinstance(info, inspect.DictType) and isinstance(value, dict):
        elements = [(f"{name}[{key!r}]", item) for key, item in value.items()]
        element_type = kind.__args__[1]
    else:
        elements, element_type = [(name, value)], kind
    for place, item in elements:
        try:
            msgspec.convert(item, element_type)
        except (msgspec.ValidationError, RecursionError) as error:
            yield problem("manifest-invalid", place, str(error) or type(error).__name__)


def _sound_entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, FileEntry]]:
    for path, entry in raw.items():
        try:
            yield path, msgspec.convert(entry, FileEntry)
        except (msgspec.ValidationError, RecursionError):
            continue  # reported field by field


def _unknown_keys(value: Any, kind: inspect.Type, place: str) -> Iterator[tuple[str, str]]:
    """(key, place) of every key of `value` that its struct does not have."""
    if isinstance(kind, inspect.UnionType):
        kind = _chosen(value, kind)
    if isinstance(kind, inspect.StructType) and isinstance(value, dict):
        known = {item.encode_name: item.type for item in kind.fields}
        for key, item in value.items():
            if key in known:
                if isinstance(item, dict | list):
                    yield from _unknown_keys(item, known[key], f"{place}.{key}" if place else key)
            elif key != kind.tag_field:
                yield key, place
    elif isinstance(kind, inspect.DictType) and isinstance(value, dict):
        for key, item in value.items():
            yield from _unknown_keys(item, kind.value_type, f"{place}[{key!r}]")
    elif isinstance(kind, inspect.VarTupleType) and isinstance(value, list):
        for number, item in enumerate(value):
            yield from _unknown_keys(item, kind.item_type, f"{place}[{number}]")


def _chosen(value: Any, union: inspect.UnionType) -> inspect.Type:
    """Which member of a union the value is: by its tag, or the only one that holds others."""
    for member in union.types:
        if not isinstance(member, inspect.StructType):
            continue
        if member.tag_field is None or (
            isinstance(value, dict) and value.get(member.tag_field) == member.tag
        ):
            return member
    return inspect.AnyType()
